"""`veneer bench` at tiny sizes: rows are complete, interleaved, and compare equal work. Nothing is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from veneer.pipelines.bench import ROWS, BenchConfig, BenchResult, bench

from tests.raising import raises
from veneer.base_models.folders import BaseModelError
from veneer.benchmarks import caching, denoiser, peers, switching
from veneer.benchmarks.shapes import SHAPES, BenchError, sharing, unet
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.image_io import DataError
from veneer.training.data.latent_cache import Cache

TINY = SHAPES["tiny"]
ROUNDS = 2


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    # tests/benchmarks has tests of the contenders of those that are left out
    rows = tuple(row for row in ROWS if row not in ("family", "side-networks", "conditional", "freezing"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switching, "COUNTS", (1, 2, 8))  # as many as are published: tests/benchmarks/test_switching.py
        return bench(BenchConfig(size="tiny", rounds=ROUNDS, rank=4, rows=rows, out=out))


def small_unet() -> Any:
    return unet(TINY.unet, TINY.latent, torch.float32, seed=0)


def test_all_rows_come_out(result: BenchResult) -> None:
    pairs = {outcome.name: [(r.of, r.to) for r in outcome.ratios()] for outcome in result.outcomes}
    against_both = [("veneer", "floor"), ("peft", "floor"), ("veneer", "peft")]
    attached = [("veneer", "peft"), ("veneer", "peft, low_cpu_mem_usage")]
    assert pairs.pop("switching")
    assert pairs.pop("mixed batch")
    assert pairs == {
        "training step": against_both,
        "forward pass": against_both,
        "attach": attached,
        "attach, all linears": attached,
        "start, dora": [("veneer", "peft")],
        "load, diffusers": [("veneer", "safetensors"), ("veneer", "diffusers")],
        "load, kohya": [("veneer", "safetensors")],
        "merge": [("veneer", "copy"), ("veneer", "diffusers")],
        "unmerge": [("veneer", "diffusers")],
        "few-photo job": [("cold caches", "no caches"), ("warm caches", "no caches")],
    }


@pytest.mark.parametrize(
    ("wrong", "error", "data"),
    [
        ({"base": "nowhere"}, BaseModelError, {"where": "base", "given": "nowhere"}),
        ({"photos": Path("nowhere")}, DataError, {"file": "nowhere", "given": "missing"}),
    ],
    ids=["base", "photos"],
)
def test_a_missing_base_or_photos_of_the_last_row_is_rejected_before_the_first(
    wrong: dict[str, Any], error: type[Exception], data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with raises(error, **data):
        bench(BenchConfig(size="tiny", rounds=1, rows=("attach", "few-photos"), **wrong))
    assert not capsys.readouterr().out  # no row was timed, nor the table's head printed


def test_contenders_ran_by_turns(result: BenchResult) -> None:
    for outcome in result.outcomes:
        rounds = [[s.contender for s in outcome.samples if s.round == turn] for turn in range(ROUNDS)]
        assert [s.round for s in outcome.samples] == sorted(s.round for s in outcome.samples)
        assert all(sorted(names) == sorted(outcome.values()) for names in rounds)
        assert rounds[1] == rounds[0][1:] + rounds[0][:1]


def test_the_file_holds_the_timings_and_the_ratios_that_follow(result: BenchResult) -> None:
    out = result.config.out
    assert out is not None
    written = json.loads(out.read_text())
    assert {"torch", "peft", "cpu", "cores", "threads"} <= set(written["environment"])
    assert written["config"]["size"] == "tiny"
    for row in written["rows"]:
        for ratio in row["ratios"]:
            of, to = ([s["value"] for s in row["samples"] if s["contender"] == ratio[side]] for side in ("of", "to"))
            assert ratio["least"] == min(a / b for a, b in zip(of, to, strict=True))
            assert ratio["most"] == max(a / b for a, b in zip(of, to, strict=True))
    assert out.with_suffix(".md").read_text() == str(result)


def test_results_name_no_place(result: BenchResult) -> None:
    assert str(result.config.out.parent) not in json.dumps(result.as_json())  # type: ignore[union-attr]


def test_veneer_and_peft_compute_the_same_step() -> None:
    """With the same A and B, the loss and the gradient of every matrix agree."""
    base = small_unet()
    ours, theirs = peers.with_veneer(sharing(base), 4), peers.with_peft(sharing(base), 4)
    mine = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    other = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    pairs = [(p, other[_in_peft(name)]) for name, p in mine.items()]
    assert len(pairs) == len(other) > 0
    with torch.no_grad():
        for index, (a, b) in enumerate(pairs):
            a.copy_(b.copy_(torch.randn(a.shape, generator=torch.Generator().manual_seed(index)) * 0.5))
    inputs, target = denoiser.inputs(TINY, torch.float32, seed=0)
    losses = [F.mse_loss(model(*inputs).sample, target) for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    assert losses[0].item() != pytest.approx(F.mse_loss(base(*inputs).sample, target).item(), rel=1e-3)
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad)


def _in_peft(name: str) -> str:
    """`….to_q.veneer_lora.adapters.0.down` in peft's names."""
    layer, _, rest = name.partition(".veneer_lora.")
    return f"{layer}.lora_{ {'down': 'A', 'up': 'B'}[rest.rpartition('.')[2]] }.default.weight"


def test_the_floor_trains_one_number_and_reaches_the_input() -> None:
    floor = denoiser.Floor(small_unet())
    inputs, target = denoiser.inputs(TINY, torch.float32, seed=0)
    F.mse_loss(floor(*inputs).sample, target).backward()
    assert peers.trained(floor) == 1
    assert floor.offset.grad is not None
    assert floor.offset.grad.abs() > 0


def test_contenders_share_the_base_and_nothing_else() -> None:
    base = small_unet()
    ours = peers.with_veneer(sharing(base), 4)
    assert ours.conv_in.weight is base.conv_in.weight
    assert peers.trained(base) == 0
    inputs, _ = denoiser.inputs(TINY, torch.float32, seed=0)
    with torch.no_grad():
        before = base(*inputs).sample
        for p in ours.parameters():
            if p.requires_grad:
                p.add_(1)
        assert torch.equal(base(*inputs).sample, before)
        assert not torch.equal(ours(*inputs).sample, before)


def test_unequal_targets_are_refused() -> None:
    base = small_unet()
    with raises(BenchError, where="targets"):
        peers.check_equal(peers.with_veneer(sharing(base), 4), peers.with_peft(sharing(base), 2))


def test_caches_change_the_time_and_not_the_training(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    photos = caching.generate_images(tmp_path / "photos", 2, seed=0)
    caching.contests(pipe, photos, TINY, 4, 0, tmp_path)
    cache = Cache(tmp_path / "cache")
    bare, cold = (caching.train(pipe, photos, c, TINY, 4, 0) for c in (None, cache))
    assert cache.misses == 3  # two photos and one caption
    again = Cache(tmp_path / "cache")
    warm = caching.train(pipe, photos, again, TINY, 4, 0)
    assert (again.misses, again.hits > 0) == (0, True)
    assert bare == cold == warm


def test_without_peft_the_rest_is_timed_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    alone = bench(BenchConfig(size="tiny", rounds=1, rows=("denoiser", "attach")))
    assert [(r.of, r.to) for o in alone.outcomes for r in o.ratios()] == [("veneer", "floor")] * 2
    assert "pip install 'veneer[peft]'" in capsys.readouterr().out
    assert "pip install 'veneer[peft]'" in str(alone)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("size", "huge", {"tiny", "small", "sd15"}),
        ("rows", ("attach", "sites"), {"denoiser", "family", "side-networks", "attach", "few-photos"}),
        ("rows", (), {"denoiser"}),
        ("latent", 12, 8),
        ("rounds", 0, 1),
        ("clock", "sun", {"wall", "cpu"}),
    ],
)
def test_an_invalid_setting_is_an_error_with_the_choices(name: str, value: Any, expected: Any) -> None:
    with raises(BenchError, where=name, given=value) as caught:
        BenchConfig(**{name: value})
    assert expected <= set(caught.value.expected) if isinstance(expected, set) else caught.value.expected == expected
