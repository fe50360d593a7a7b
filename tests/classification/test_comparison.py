"""Method comparison: parsing of rows, the table against hand-computed values, and reuse of results."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from veneer.pipelines.compare import CompareConfig, compare

from tests.classification.small import image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.report.comparison_table import summarize_runs, table, verdict, write_accuracy_plot
from veneer.classification.train.comparison import DEFAULTS, RunMetrics, parse_rows
from veneer.classification.train.hyperparameter_search import read_search
from veneer.injection import UnknownName
from veneer.injection.errors import OptionError, UnknownOption
from veneer.training.data.image_io import DataError


def test_parse_rows() -> None:
    rows = parse_rows("lora, adaptformer(bottleneck=8, scale=0.5), lora(rank=2, where=attn mlp.in), vpt+lora, scratch")
    assert [r.label for r in rows] == [
        "lora", "adaptformer(bottleneck=8, scale=0.5)", "lora(rank=2, where=attn mlp.in)", "vpt+lora", "scratch",
    ]  # fmt: skip
    assert rows[1].options == {"adaptformer": {"bottleneck": 8, "scale": 0.5}}
    assert rows[2].where == ("attn", "mlp.in")
    assert (rows[3].method, rows[3].options) == ("vpt+lora", {})
    assert (rows[4].method, rows[4].scratch) == ("full", True)


@pytest.mark.parametrize(
    ("written", "option", "given"),
    [
        ("lora(rank", "methods", "lora(rank"),
        ("lora(rank)", "methods", "rank"),
        ("lora, lora", "methods", ("lora", "lora")),
        ("lora(rank=x)", "rank", "x"),
        ("lora(rank=2.5)", "rank", 2.5),
        ("lora(alpha=True)", "alpha", True),
        ("lora(rslora=1)", "rslora", 1),
        ("", "methods", ()),
    ],
)
def test_parse_rows_rejects_invalid_text(written: str, option: str, given: Any) -> None:
    with raises(OptionError, option=option, given=given):
        parse_rows(written)


def test_parse_rows_rejects_unknown_methods_and_options() -> None:
    with raises(UnknownName, name="loro", kind="method"):
        parse_rows("loro")
    with raises(UnknownOption, name="rnk", where="lora"):
        parse_rows("lora(rnk=2)")


def measured(row: str, seed: int, accuracy: float, **more: Any) -> RunMetrics:
    defaults: dict[str, Any] = {
        "key": f"{row}{seed}", "val_accuracy": accuracy, "chosen_epoch": 1, "learning_rate": 1e-3, "trainable_parameters": 10,
        "stored_bytes": 2048, "step_over_floor": 2.0, "peak_memory_bytes": 3_000_000, "cached": False, "seconds": 1.0,
    }  # fmt: skip
    return RunMetrics(row, seed, test_accuracy=accuracy, **{**defaults, **more})


RUNS = [
    *(measured("linear_probe", s, a, cached=True) for s, a in enumerate((0.70, 0.80, 0.75))),
    *(measured("lora", s, a) for s, a in enumerate((0.80, 0.91, 0.84))),
    *(measured("vpt", s, a) for s, a in enumerate((0.60, 0.95, 0.75))),
    *(measured("ia3", s, a) for s, a in enumerate((0.60, 0.71, 0.64))),
]


def test_table_means_intervals_and_paired_differences(tmp_path: Path) -> None:
    lines = summarize_runs(RUNS, ["linear_probe", "lora", "vpt", "ia3"])
    lora = lines[1]
    assert lora.accuracy == pytest.approx(0.85)
    assert lora.over == pytest.approx(0.1)
    assert lora.over_half == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5), "differences 0.10, 0.11, 0.09"
    text = table(lines)
    assert "| `lora` | 85.0 ± 13.8 | +10.0 ± 2.5 | 85.0 | 10 | 2.05 kB | 2.00 | 3 MB | 0.001 |" in text
    assert text.index("`lora`") < text.index("`vpt`") < text.index("`ia3`")
    assert "2.00 (cached)" in text
    assert verdict(lines) == [
        "Better than the linear probe: lora.",
        "Not clearly different from the linear probe: vpt.",
        "Worse than the linear probe: ia3.",
        "Best validation accuracy: lora, with test accuracy 85.0 ± 13.8.",
    ]
    write_accuracy_plot(lines, "toy", tmp_path / "accuracy.png")
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.size[0] > 400


def test_an_option_at_its_default_leaves_the_results_of_earlier_versions_valid() -> None:
    """The hash of a run has every option of 0.1; a later one only if it is set."""
    always = (
        "data model weights method options head lp_ft templates batch_norm shots validation test split_seed steps epochs batch "
        "gradient_accumulation_steps learning_rate schedule warmup weight_decay label_smoothing class_weights mixup cutmix ema "
        "augment squash size mixed_precision patience search search_epochs cache seed resume dry_run workers tracker out "
        "optimizer max_grad_norm where target_modules"
    )
    fields = {field.name for field in dataclasses.fields(TransferConfig)}
    assert fields - DEFAULTS.keys() == {*always.split()}
    config = TransferConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_existing_results_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.classification.train import comparison

    data, model = image_folder(tmp_path / "pictures", count=10), model_folder(tmp_path, "vit")
    fitted: list[str] = []
    train = comparison.ClassifierTrainer.train

    def counted(self: Any) -> Any:
        fitted.append(self.config.method)
        return train(self)

    monkeypatch.setattr(comparison.ClassifierTrainer, "train", counted)
    defaults: dict[str, Any] = {
        "data": str(data), "model": str(model), "epochs": 1, "batch": 8, "workers": 1, "out": tmp_path / "out", "augment": "none",
    }  # fmt: skip
    compare(CompareConfig(methods="bitfit", seeds=1, **defaults))
    first = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert fitted == ["linear_probe", "bitfit"]
    fitted.clear()
    compare(CompareConfig(methods="bitfit, lora(rank=2), scratch", seeds=2, **defaults))
    assert sorted(fitted) == ["bitfit", "full", "full", "linear_probe", "lora", "lora"], "only missing runs"
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert runs[: len(first)] == first
    assert {(r["row"], r["seed"]) for r in runs} == {
        (row, seed) for row in ("linear_probe", "bitfit", "lora(rank=2)", "scratch") for seed in (0, 1)
    }
    by_row = {(r["row"], r["seed"]): r for r in runs}
    full = sum(p.numel() for p in _model(model).parameters())
    assert by_row["scratch", 0]["trainable_parameters"] == full
    assert by_row["linear_probe", 0]["cached"]
    assert by_row["lora(rank=2)", 0]["trainable_parameters"] == 2 * 4 * 2 * 48 + 3 * 25
    assert by_row["scratch", 0]["peak_memory_bytes"] > by_row["linear_probe", 0]["peak_memory_bytes"]
    assert (tmp_path / "out" / "compare.md").read_text().count("| `") == 4
    assert not list((tmp_path / "out" / "runs").iterdir())
    fitted.clear()
    compare(CompareConfig(methods="bitfit, lora(rank=2), scratch", seeds=2, **{**defaults, "epochs": 2}))
    assert len(fitted) == 8, "results of another number of epochs are not reused"
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["other_runs"] == runs
    assert {run["seed"] for run in record["runs"]} == {0, 1}
    assert len(record["runs"]) == 8, "the table is of runs with the same options"
    fitted.clear()
    compare(CompareConfig(methods="bitfit", seeds=1, **defaults))
    assert fitted == []
    with raises(DataError, file=tmp_path / "out" / "splits.json", where="split_seed", given=1, expected=0):
        compare(CompareConfig(methods="bitfit", seeds=1, split_seed=1, **defaults))
    with raises(DataError, file=tmp_path / "out" / "splits.json", where="shots", given=2, expected=None):
        compare(CompareConfig(methods="bitfit", seeds=1, shots=(2,), **defaults))


def test_the_search_does_not_depend_on_the_run_that_needs_it_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = CompareConfig(
        data=str(image_folder(tmp_path / "pictures", count=10)), model=str(model_folder(tmp_path, "vit")), methods="bitfit",
        baseline=False, seeds=2, epochs=1, batch=8, workers=1, augment="strong", search=2, search_epochs=1, out=out,
    )  # fmt: skip
    compare(config)
    first = read_search(out / "search" / "bitfit")
    record = json.loads((out / "results.json").read_text())
    record["runs"] = [run for run in record["runs"] if run["seed"] == 0]
    (out / "results.json").write_text(json.dumps(record))
    shutil.rmtree(out / "search")
    compare(config)
    assert read_search(out / "search" / "bitfit") == first


def _model(folder: Path) -> Any:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)


def test_clip_baseline_is_zero_shot(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "pictures", count=8)
    out = compare(
        CompareConfig(
            data=str(data), model="bundled_clip", methods="tip_adapter, clip_adapter", seeds=1, epochs=1, batch=8, workers=1,
            augment="none", out=tmp_path / "out",
        )
    )  # fmt: skip
    runs = {r["row"]: r for r in json.loads((out / "results.json").read_text())["runs"]}
    assert list(runs) == ["zero_shot", "tip_adapter", "clip_adapter"]
    assert (runs["zero_shot"]["trainable_parameters"], runs["tip_adapter"]["trainable_parameters"]) == (0, 0)
    assert runs["tip_adapter"]["stored_bytes"] > 3 * 4 * 128 * 4, "cached features of the training images of three classes"
    assert all(r["cached"] for r in runs.values())
    assert "over zero-shot" in (out / "compare.md").read_text()
