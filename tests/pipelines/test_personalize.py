"""`veneer personalize` on tiny pipelines of every family: files, metrics, errors."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from veneer.pipelines.personalize import PersonalizeConfig, personalize

import veneer
from tests.raising import raises
from veneer import base_models
from veneer.formats import load_all
from veneer.injection import SaveError
from veneer.injection.errors import OptionError, SelectionError, UnknownName, UnsupportedSite, VeneerError
from veneer.training.data.image_io import DataError
from veneer.training.loop.disk_space import DiskFull
from veneer.training.loop.divergence import Diverged
from veneer.training.loop.errors import TrainError
from veneer.training.preflight.preflight import PreflightError

QUICK: Mapping[str, Any] = {
    "steps": 2, "eval_seeds": 0, "preview_steps": 2, "features": "bundled", "tracker": "none", "prompts": ("a {concept}",),
    "class_word": "cat", "template": ("a {concept}",),
}  # fmt: skip


def run(base: str, photos: Path, out: Path, **settings: Any) -> Path:
    return personalize(PersonalizeConfig(photos=photos, base=base, out=out, concept="<toy>", **{**QUICK, **settings}))


@pytest.mark.usefixtures("small_flux")
@pytest.mark.parametrize(
    ("kind", "method", "files"),
    [
        ("sd", "lora", {"pytorch_lora_weights"}),
        ("sd", "textual_inversion", {"learned_embeds"}),
        ("sd", "p_plus", set()),
        ("sd", "pivotal", {"pytorch_lora_weights", "learned_embeds"}),
        ("sd", "bitfit", set()),
        ("sd2", "lora", {"pytorch_lora_weights"}),
        ("sdxl", "pivotal", {"pytorch_lora_weights", "learned_embeds"}),
        ("sd3", "lora", {"pytorch_lora_weights"}),
        ("flux", "lora", {"pytorch_lora_weights"}),
        ("pixart", "lora", {"pytorch_lora_weights"}),
    ],
)
def test_every_family_gives_its_files(base: Any, photos: Path, tmp_path: Path, kind: str, method: str, files: set[str]) -> None:
    out = run(base(kind), photos, tmp_path / "out", method=method)
    assert {p.stem for p in out.glob("*.safetensors")} == {"adapter", *files}
    assert (out / "before_after.png").is_file()
    assert all(t.isfinite().all() for f in out.glob("*.safetensors") for t in load_file(f).values())
    record = json.loads((out / "result.json").read_text())
    assert record["training"]["steps"] == 2
    assert record["training"]["loss"] > 0


def test_dit_trains_on_a_class_label(base: Any, photos: Path, tmp_path: Path) -> None:
    out = personalize(
        PersonalizeConfig(
            photos=photos, base=base("dit"), out=tmp_path / "out", concept="3", steps=2, eval_seeds=0, tracker="none",
            template=("{concept}",), prompts=("{concept}",),
        )
    )  # fmt: skip
    assert (out / "adapter.safetensors").is_file()


def test_the_saved_adapter_generates_what_was_trained(base: Any, photos: Path, tmp_path: Path) -> None:
    """The trained adapter in a new pipeline: its weights changed, and every tensor of the file is loaded."""
    out = run(base("sd"), photos, tmp_path / "out", text_encoder=True, learning_rate=1e-2)
    pipe = veneer.base_models.load(base("sd"))
    attachment = veneer.load(pipe, out)
    state = load_file(out / "adapter.safetensors")
    assert attachment.state_dict().keys() == state.keys()
    assert all(torch.equal(attachment.state_dict()[k], t) for k, t in state.items())
    assert {site.component for site, _ in attachment.parts.values()} == {"unet", "text_encoder"}
    assert any(t.any() for k, t in state.items() if k.endswith(":up"))


@pytest.mark.usefixtures("small_flux")
@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_a_base_model_in_bfloat16_trains_a_float32_adapter(base: Any, photos: Path, tmp_path: Path, kind: str) -> None:
    """The same photos and noise: the losses differ by the rounding of the base model only."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        out = run(base(kind), photos, tmp_path / dtype, dtype=dtype, text_encoder=kind != "flux", learning_rate=1e-2)
        state = load_file(out / "adapter.safetensors")
        assert {t.dtype for t in state.values()} == {torch.float32}
        assert any(t.any() for k, t in state.items() if k.endswith(":up"))
        losses[dtype] = json.loads((out / "result.json").read_text())["training"]["loss"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"], "the base model was in bfloat16"


def test_a_base_model_in_float16_needs_loss_scaling(base: Any, photos: Path, tmp_path: Path) -> None:
    with raises(TrainError, where="dtype", given="no", expected="fp16"):
        run(base("sd"), photos, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_options_by_site_are_checked_before_the_base_model_is_loaded(photos: Path, tmp_path: Path) -> None:
    for option, value in (("rank", "abc"), ("rank", 4.5), ("alpha", "3")):
        with raises(OptionError, option=option, given=repr(value)):
            run(str(tmp_path), photos, tmp_path / "out", options={"lora": {"by_site": {"attn.q": {option: value}}}})


def test_class_images_are_generated_once_and_used(base: Any, photos: Path, tmp_path: Path) -> None:
    out = run(base("sd"), photos, tmp_path / "out", class_images=2)
    assert len(list((out / "prior").glob("*.png"))) == 2


def test_stop_and_resume_through_the_job(base: Any, photos: Path, tmp_path: Path) -> None:
    """Four steps in one go, and two steps then two more: the same files, byte for byte."""
    whole = run(base("sd"), photos, tmp_path / "whole", method="pivotal", steps=4, checkpoint_every=2, ema=0.9)
    run(base("sd"), photos, tmp_path / "parts", method="pivotal", steps=2, checkpoint_every=2, ema=0.9)
    parts = run(base("sd"), photos, tmp_path / "parts", method="pivotal", steps=4, checkpoint_every=2, ema=0.9, resume=True)
    for file in whole.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(parts / file.name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours), file.name


@pytest.mark.parametrize(
    ("settings", "error", "data"),
    [
        ({"method": "lora+lora"}, OptionError, {"option": "method", "given": "lora+lora"}),
        ({"method": "lroa"}, UnknownName, {"name": "lroa", "kind": "method"}),
        ({"options": {"bitfit": {}}}, OptionError, {"option": "options", "given": ("bitfit",)}),
        ({"where": ("xattn.nothing",)}, SelectionError, {"pattern": "xattn.nothing"}),
        ({"class_images": 2, "class_word": ""}, OptionError, {"option": "class_word"}),
        ({"optimizer": "adam5"}, TrainError, {"where": "optimizer", "given": "adam5"}),
        ({"resolution": 13}, DataError, {"where": "resolution", "given": 13}),
    ],
)
def test_invalid_settings_are_errors_before_training(
    base: Any, photos: Path, tmp_path: Path, settings: dict[str, Any], error: type[Exception], data: dict[str, Any]
) -> None:
    with raises(error, **data):
        run(base("sd"), photos, tmp_path / "out", **settings)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_template_that_is_too_long_is_refused_before_training(base: Any, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(PreflightError) as caught:
        run(base("sd"), photos, tmp_path / "out", template=("a {concept} " + "word " * 90,))
    assert {concern.about for concern in caught.value.given} == {"prompt"}
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_token_that_the_base_has_is_refused(base: Any, photos: Path, tmp_path: Path) -> None:
    config = PersonalizeConfig(
        photos=photos, base=base("sd"), out=tmp_path / "out", concept="<|endoftext|>", method="textual_inversion", **QUICK
    )
    with raises(UnsupportedSite, option="tokens", given="<|endoftext|>"):
        personalize(config)


@pytest.mark.parametrize(
    ("kind", "method", "concept", "word", "token"),
    [
        ("sd", "textual_inversion", "vase", "vase", "<vase>"),
        ("sd", "pivotal", "My Vase", "vase", "<my-vase>"),
        ("sd", "pivotal", "dog", "animal", "<dog>"),
        ("sd", "pivotal", "sksdog", "dog", "sksdog"),
        ("sd", "lora", "my vase", "vase", "my vase"),
        ("sdxl", "pivotal", "vase", "vase", "<vase>"),
        ("sd3", "textual_inversion", "my dog", "dog", "<my-dog>"),
    ],
)
def test_an_ordinary_concept_gets_a_placeholder_token(
    base: Any, photos: Path, tmp_path: Path, capsys: Any, kind: str, method: str, concept: str, word: str, token: str
) -> None:
    """In prompts, captions, files and the record; a method without token embeddings keeps the concept."""
    (photos / "0.txt").write_text(f"a {concept} on a table, {concept.lower()}!")
    settings = {**QUICK, "class_word": word, "prompts": ("a {concept}", f"the {concept}")}
    out = personalize(
        PersonalizeConfig(photos=photos, base=base(kind), out=tmp_path / "out", concept=concept, method=method, **settings)
    )
    told = capsys.readouterr().out
    assert (f"token is {token}" in told) == (token != concept)
    record = json.loads((out / "result.json").read_text())
    assert record["config"]["concept"] == token
    assert [text.replace("{concept}", token) for text in record["config"]["prompts"]] == [f"a {token}", f"the {token}"]
    if method == "lora":
        return
    assert token in load_file(out / "learned_embeds.safetensors") or kind != "sd"
    pipe = base_models.load(base(kind))
    tuned = load_all(pipe, out / "adapter.safetensors")
    assert any(a.method.config().get("tokens") == token for a in tuned)
    ids = pipe.tokenizer.encode(f"a {token} {word}", add_special_tokens=False)
    assert pipe.tokenizer.convert_tokens_to_ids(token) in ids
    assert pipe.tokenizer.encode(word, add_special_tokens=False) == ids[2:]


def test_a_finished_run_is_not_overwritten(base: Any, photos: Path, tmp_path: Path) -> None:
    out = run(base("sd"), photos, tmp_path / "out")
    before = (out / "adapter.safetensors").read_bytes()
    with raises(VeneerError, file=out, where="out", given="finished"):
        run(base("sd"), photos, tmp_path / "out")
    assert (out / "adapter.safetensors").read_bytes() == before


def test_divergence_keeps_the_last_good_weights(base: Any, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        run(base("sd"), photos, tmp_path / "out", learning_rate=1e30, max_grad_norm=0.0, steps=6, optimizer="sgd")
    assert all(t.isfinite().all() for t in load_file(tmp_path / "out" / "last_good.safetensors").values())


def test_a_run_prints_its_phases_and_result(base: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(base("sd"), photos, tmp_path / "out", eval_seeds=2, drift_prompts=("a dog", "a car"), preview_every=1)
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines() if line]
    last = {line["phase"]: (line["done"], line["total"]) for line in lines}
    assert last == {"loading": (0, 0), "training": (2, 2), "previews": (1, 1), "saving": (0, 0), "evaluating": (12, 12)}
    assert "0/12" in shown.err
    record = json.loads((out / "result.json").read_text())
    assert record["phase_seconds"].keys() == {"loading", "training", "previews", "evaluating", "saving"}
    assert record["verdict"]["outcome"] in ("learned", "partly", "not_learned", "overfitted", "unknown")
    for part in (str(out), "adapter.safetensors", record["verdict"]["summary"], "veneer generate 'a <toy>'", "--side-by-side"):
        assert part in shown.out
    assert "14 images of previews and evaluation" in shown.out, "2 previews, 12 images of the evaluation"


def test_without_evaluation_the_verdict_is_unknown(base: Any, photos: Path, tmp_path: Path) -> None:
    record = json.loads((run(base("sd"), photos, tmp_path / "out") / "result.json").read_text())
    assert (record["metrics"], record["verdict"]["outcome"]) == (None, "unknown")


def test_no_space_for_the_run_is_an_error_before_training(
    base: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.training.preflight.preflight.free_bytes", lambda folder: 2**16)
    with pytest.raises(PreflightError) as caught:
        run(base("sd"), photos, tmp_path / "out")
    assert [concern.about for concern in caught.value.given] == ["disk"]


def test_a_disk_that_fills_up_keeps_the_checkpoint(
    base: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter cannot be written: the error has no path, and the run resumes from its last checkpoint."""

    def full(*given: Any, **options: Any) -> None:
        raise SaveError("/srv/secret") from OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("veneer.formats.native.save", full)
        with pytest.raises(DiskFull) as caught:
            run(base("sd"), photos, out, checkpoint_every=2)
    assert (caught.value.file, caught.value.kept) == ("adapter.safetensors", ("checkpoint-000002",))
    assert "/" not in str(caught.value)
    assert not (out / "result.json").exists()
    run(base("sd"), photos, out, checkpoint_every=2, resume=True)
    record = json.loads((out / "result.json").read_text())
    assert (record["training"]["resumed_from"], record["training"]["steps"]) == (2, 2)


def test_files_for_others_are_done_without_on_a_full_disk(
    base: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **options: Any) -> None:
        raise SaveError("/srv/secret") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("veneer.formats.diffusers.save", full)
    record = json.loads((run(base("sd"), photos, tmp_path / "out") / "result.json").read_text())
    assert record["files"] == ["adapter.safetensors"]
    assert ["pytorch_lora_weights" in warning for warning in record["training"]["warnings"]] == [True]
