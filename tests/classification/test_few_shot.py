"""Few-shot curves: samples of each seed, one search for all numbers of shots, the table, the plot, and resumed comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from veneer.pipelines.compare import CompareConfig, compare

from tests.classification.small import image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Data, Views, open_data
from veneer.classification.data.unlabeled import read_unlabeled
from veneer.classification.protocols import few_shot_plot
from veneer.classification.protocols.few_shot import check_shots, few_shot_data
from veneer.classification.protocols.few_shot_table import few_shot_page, summarize_few_shot
from veneer.classification.train.comparison import RunMetrics
from veneer.classification.train.hyperparameter_search import read_search
from veneer.injection.errors import OptionError
from veneer.training.data.image_io import DataError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), count=10)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), "vit")


@pytest.fixture(scope="module")
def data(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    return open_data(TransferConfig(data=str(images), validation=0.2, test=0.2), tmp_path_factory.mktemp("out"))


def counts(data: Data, indices: Sequence[int]) -> list[int]:
    labels = [data.source.examples[index].label for index in indices]
    return [labels.count(label) for label in range(len(data.classes))]


def test_samples_have_the_shots_of_each_class_and_the_same_test_split(data: Data) -> None:
    for shots, validation in ((1, 1), (3, 2)):
        sample = few_shot_data(data, shots, seed=1)
        assert counts(data, sample.splits.train) == [shots] * 3
        assert counts(data, sample.splits.validation) == [validation] * 3, "min(shots, 4), of two"
        assert sample.splits.test == data.splits.test
        assert set(sample.splits.train) <= set(data.splits.train)
        assert set(sample.splits.validation) <= set(data.splits.validation)


def test_samples_differ_by_seed_and_are_nested_by_shots(data: Data) -> None:
    samples = {(shots, seed): few_shot_data(data, shots, seed).splits for shots in (1, 4) for seed in (0, 1)}
    assert set(samples[1, 0].train) < set(samples[4, 0].train)
    assert samples[4, 0].train != samples[4, 1].train
    assert len({splits.digest for splits in samples.values()}) == 4
    assert few_shot_data(data, 4, 0).splits == samples[4, 0]


def test_invalid_numbers_of_shots(data: Data) -> None:
    for shots in ((0, 1), (2, 2), (-1,)):
        with raises(OptionError, option="shots", given=shots):
            CompareConfig(shots=shots).with_defaults()
    check_shots((1, 16, 2))
    with raises(DataError, where="shots", given=0, expected=1):
        few_shot_data(data, 0, seed=0)


def test_images_with_several_labels_have_no_few_shot_sample(tmp_path: Path, images: Path) -> None:
    names = sorted(str(file.relative_to(images)) for file in images.rglob("*.png"))
    table = images / "labels.csv"
    table.write_text("\n".join(["path,label", *(f"{name},{name.split('/')[0]};all" for name in names)]))
    several = open_data(TransferConfig(data=str(table), multi_label=True, validation=0.2, test=0.2), tmp_path)
    table.unlink()
    with raises(DataError, where="shots", given=1, expected=None):
        few_shot_data(several, 1, seed=0)


def run(row: str, seed: int, accuracy: float, **more: Any) -> RunMetrics:
    return RunMetrics(row, seed, f"{row}{seed}{accuracy}", accuracy, accuracy, 1, 0.01, 100, 400, 1.0, 1, False, 1.0, **more)


RUNS = {
    4: [*(run("linear_probe", s, a) for s, a in enumerate((0.4, 0.6))), *(run("vpt", s, a) for s, a in enumerate((0.6, 0.7)))],
    1: [run("linear_probe", 0, 0.2), run("vpt", 0, 0.1)],
}


def test_table_has_means_intervals_and_paired_differences() -> None:
    records = {(record["row"], record["shots"]): record for record in summarize_few_shot(RUNS)}
    assert [*records] == [("linear_probe", 1), ("linear_probe", 4), ("vpt", 1), ("vpt", 4)]
    four = records["vpt", 4]
    assert four["accuracy"] == pytest.approx(0.65)
    assert four["half"] == pytest.approx(12.706205 * 0.05, rel=1e-5)
    assert (four["over"], four["over_half"]) == pytest.approx((0.15, 12.706205 * 0.05), rel=1e-5)
    assert (records["vpt", 1]["half"], records["vpt", 1]["over_half"]) == (None, None), "one seed has no interval"
    assert records["vpt", 1]["over"] == pytest.approx(-0.1)
    page = few_shot_page("toy", "about", [*records.values()])
    assert "| method | 1 shot | 4 shots | trainable parameters | learning rate |" in page
    assert "| `vpt` | 10.0 | 65.0 ± 63.5 | 100 | 0.01 |" in page
    assert "| `vpt` | -10.0 | +15.0 ± 63.5 | 100 | 0.01 |" in page
    assert page.index("`vpt`") < page.index("`linear_probe`"), "sorted by the mean validation accuracy"


def test_plot_has_a_panel_for_each_method_of_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    write = few_shot_plot.write_figure
    monkeypatch.setattr(few_shot_plot, "write_figure", lambda figure, path: (figures.append(figure), write(figure, path)))
    records = summarize_few_shot(RUNS)
    for model in ("one", "two"):
        (tmp_path / model).mkdir()
        (tmp_path / model / few_shot_plot.FILE).write_text(json.dumps({"config": {"model": model}, "table": records}))
    few_shot_plot.main([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "both.png")])
    axes = [each for each in figures[0].axes if each.axison]
    assert [each.get_title() for each in axes] == ["vpt\none", "vpt\ntwo"], "the baseline has no panel"
    lines = {line.get_linestyle(): line for line in axes[0].lines}
    assert lines["-"].get_xdata().tolist() == [1, 4]
    assert lines["-"].get_ydata().tolist() == pytest.approx([10, 65])
    assert lines["--"].get_ydata().tolist() == pytest.approx([20, 50])
    with Image.open(tmp_path / "both.png") as image:
        assert image.size[0] > 300


def test_compare_writes_the_curves_and_repeats_no_run(
    tmp_path: Path, images: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.classification.train import comparison

    trained: list[tuple[str, int]] = []
    trials: list[tuple[str, int]] = []
    train = comparison.ClassifierTrainer.train

    def record(self: Any) -> Any:
        (trained if self.folder.parent.name == "runs" else trials).append((self.config.method, self.steps))
        return train(self)

    monkeypatch.setattr(comparison.ClassifierTrainer, "train", record)
    config = CompareConfig(
        data=str(images), model=str(model), methods="bitfit", baseline=False, shots=(1, 3), seeds=2, steps=1, batch=2, search=2,
        search_epochs=1, validation=0.2, test=0.2, workers=1, augment="none", out=tmp_path / "out",
    )  # fmt: skip
    out = compare(config)
    assert trained == [("bitfit", 1)] * 4, "two numbers of shots and two seeds, without trials"
    record_of = json.loads((out / "few_shot.json").read_text())
    assert {(each["row"], each["shots"], each["seeds"]) for each in record_of["table"]} == {
        ("bitfit", shots, 2) for shots in (1, 3)
    }
    assert (out / "few_shot.md").is_file()
    assert (out / "few_shot.png").is_file()
    assert len(trials) == len(read_search(out / "search" / "bitfit")) > 0, "one search"
    results = {name: json.loads((out / name / "results.json").read_text()) for name in ("1-shots-0", "3-shots-0", "3-shots-1")}
    assert len({each["data"]["split_digest"] for each in results.values()}) == 3
    best = {run["learning_rate"] for each in results.values() for run in each["runs"]}
    assert len(best) == 1, "one learning rate for all numbers of shots and seeds"
    assert not any((out / name / "search").exists() for name in results)
    trained.clear()
    trials.clear()
    before = (out / "few_shot.json").read_text()
    (out / "3-shots-1" / "results.json").unlink()
    compare(config)
    assert [method for method, _ in trained] == ["bitfit"], "only the run without results"
    assert trials == []
    after = json.loads((out / "few_shot.json").read_text())["table"]
    for old, new in zip(json.loads(before)["table"], after, strict=True):
        assert math.isclose(old["accuracy"], new["accuracy"])


def test_compare_has_images_without_labels_for_methods_that_need_them(tmp_path: Path, images: Path) -> None:
    options: dict[str, Any] = {
        "data": str(images), "model": "bundled_clip", "baseline": False, "seeds": 1, "steps": 2, "batch": 4, "workers": 1,
        "augment": "none", "shots": (2,), "out": tmp_path / "out",
    }  # fmt: skip
    with raises(OptionError, option="unlabeled", method="pet", given=None):
        compare(CompareConfig(methods="pet", **options))
    with raises(OptionError, option="unlabeled", given=str(images)):
        compare(CompareConfig(methods="coop", unlabeled=images, **options))
    out = compare(CompareConfig(methods="pet, null_prompt", unlabeled=images, **options))
    rows = {run["row"]: run for run in json.loads((out / "results.json").read_text())["runs"]}
    assert rows["pet"]["trainable_parameters"] == 5 * rows["null_prompt"]["trainable_parameters"], (
        "four patterns, and the distilled model"
    )


def test_each_seed_has_its_own_order_of_images_without_labels(data: Data, images: Path) -> None:
    entry = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    with Views(data, entry, "none", workers=1, unlabeled=read_unlabeled(images)) as views:
        orders = []
        for seed in (0, 1, 0):
            views.reseed(seed)
            assert views.unlabeled is not None
            orders.append([views.unlabeled.order.at(number) for number in range(30)])
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
