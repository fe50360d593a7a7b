"""Generalization from base to new classes: the classes of CoOp's code, new prompts for the same adapter, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from veneer.pipelines.compare import CompareConfig, compare

from tests.raising import raises
from tests.training.images import save
from veneer.classification.data.benchmark_layouts import coop_classes
from veneer.classification.models.loading import open_classifier
from veneer.classification.protocols.base_to_new import base_and_new, check_generalization
from veneer.classification.protocols.base_to_new_table import base_to_new_page, summarize_base_to_new
from veneer.classification.protocols.benchmark_tasks import COOP
from veneer.classification.protocols.protocol_table import TaskRun
from veneer.classification.protocols.task_data import open_task, sample_shots
from veneer.classification.train.method_rows import parse_rows
from veneer.formats import load_all
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.training.data.image_io import DataError

ORDER = ("zebra", "boxer", "tabby_cat", "beagle", "apple")
"""Names by number: not the alphabetical order."""


def dataset(root: Path) -> Path:
    """Five classes with three training, one validation and two test images."""
    table: dict[str, list[Any]] = {}
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        table[split] = []
        for number in range(count):
            for label in (4, 2, 0, 3, 1):
                path = f"{ORDER[label]}/{split}_{number}.png"
                save(root / "images" / path, 32, 32, seed=10 * label + number)
                table[split].append([path, label, ORDER[label]])
    (root / "split_zhou_OxfordPets.json").write_text(json.dumps(table))
    return root


def test_classes_are_split_by_number_after_the_few_shot_sample(tmp_path: Path) -> None:
    root = dataset(tmp_path)
    assert coop_classes(root) == ["zebra", "boxer", "tabby cat", "beagle", "apple"]
    data, _ = open_task(COOP, root, shots=2, seed=1)
    base, new = base_and_new(data, coop_classes(root))
    assert base.classes == ("boxer", "tabby cat", "zebra")
    assert new.classes == ("apple", "beagle")
    sample = sample_shots(root, 2, seed=1)
    for part, folders in ((base, ("boxer", "tabby_cat", "zebra")), (new, ("apple", "beagle"))):
        names = {name: {part.source.examples[i].name for i in getattr(part.splits, name)} for name in ("train", "test")}
        assert names["train"] == {each for each in sample if "/train_" in each and each.split("/")[1] in folders}
        assert names["test"] == {f"images/{folder}/test_{number}.png" for folder in folders for number in range(2)}
    assert base.splits.digest != data.splits.digest != new.splits.digest


def test_a_class_has_one_number(tmp_path: Path) -> None:
    table = {"train": [["a.png", 0, "cat"], ["b.png", 1, "cat"]], "val": [], "test": []}
    (tmp_path / "split_zhou_A.json").write_text(json.dumps(table))
    with raises(DataError, file=tmp_path / "split_zhou_A.json"):
        coop_classes(tmp_path)


def test_classes_of_aircraft_are_those_of_its_list(tmp_path: Path) -> None:
    (tmp_path / "variants.txt").write_text("Cessna 172\n707-320\n")
    assert coop_classes(tmp_path) == ["Cessna 172", "707-320"]


@pytest.mark.parametrize(
    "row", ["tip_adapter", "coop(by_class=True)", "evp", "ilm_vp", "lora+tip_adapter", "linear_probe", "scratch"]
)
def test_methods_of_the_trained_classes_are_an_error(row: str) -> None:
    with raises(OptionError, option="methods", where=row, expected="new classes"):
        check_generalization("bundled_clip", parse_rows(f"zero_shot, {row}"))


def test_methods_that_apply_to_new_classes() -> None:
    check_generalization("bundled_clip", parse_rows("zero_shot, coop, cocoop, lora, clip_adapter, vpt+coop, full, bitfit"))
    with raises(OptionError, option="model", given="bundled"):
        check_generalization("bundled", parse_rows("lora"))


@pytest.mark.parametrize("protocol", ["vtab-1k", "fgvc"])
def test_other_protocols_have_no_new_classes(protocol: Any) -> None:
    with raises(OptionError, option="base_to_new", given=protocol, expected="coop"):
        CompareConfig(data="coop", protocol=protocol, base_to_new=True).with_defaults()


def test_base_to_new_has_16_shots_by_default() -> None:
    for protocol, shots, expected in (("none", (), (16,)), ("coop", (), (16,)), ("none", (1, 4), (1, 4))):
        options: dict[str, Any] = {"data": "coop", "protocol": protocol, "shots": shots}
        assert CompareConfig(base_to_new=True, **options).with_defaults().shots == expected


def test_a_saved_context_has_the_weights_of_other_names(tmp_path: Path) -> None:
    """The file of one set of classes, loaded on another, gives what the same context gives there."""
    logits = {}
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    base, new = (open_classifier("bundled_clip", classes).model for classes in (("boxer", "zebra", "cat"), ("apple", "beagle")))
    torch.manual_seed(1)
    trained = attach(base, "coop", tokens=2)
    file = trained.save(tmp_path / "coop.safetensors")
    (loaded,) = load_all(new, file)
    with torch.no_grad():
        logits["loaded"] = new(pixels)
        loaded.detach()
        logits["templates"] = new(pixels)
        torch.manual_seed(1)
        attach(new, "coop", tokens=2)
        logits["same context"] = new(pixels)
    torch.testing.assert_close(logits["loaded"], logits["same context"])
    assert (logits["loaded"] - logits["templates"]).abs().max() > 1e-2


def test_the_table_has_harmonic_means_of_mean_accuracies() -> None:
    accuracies = {"dtd": ((0.8, 0.5), (0.6, 0.7)), "eurosat": ((0.9, 0.3), (0.9, 0.1))}
    runs = [TaskRun(task, "coop", seed, 16, *each) for task, seeds in accuracies.items() for seed, each in enumerate(seeds)]
    (record,) = summarize_base_to_new(COOP, runs)
    assert record["tasks"]["dtd"] == pytest.approx({"base": 0.7, "new": 0.6, "harmonic_mean": 2 * 0.7 * 0.6 / 1.3})
    assert record["tasks"]["average"] == pytest.approx({"base": 0.8, "new": 0.4, "harmonic_mean": 2 * 0.8 * 0.4 / 1.2})
    student = 12.706205
    harmonic = abs(2 * 0.8 * 0.5 / 1.3 - 2 * 0.6 * 0.7 / 1.3) / 2
    halves = {"base": student * 0.1, "new": student * 0.1, "harmonic_mean": student * harmonic}
    assert record["half"]["dtd"] == pytest.approx(halves, rel=1e-5)
    assert record["half"]["average"]["base"] == pytest.approx(student * 0.05, rel=1e-5), "of the seeds' means over tasks"
    page = base_to_new_page(COOP, [record], "about")
    assert "| dtd | `coop` | 70.0 ± 127.1 | 60.0 ± 127.1 | 64.6 ± 19.5 |" in page
    assert "| average | `coop` | 80.0 ± 63.5 |" in page
    (single,) = summarize_base_to_new(None, [run for run in runs if run.seed == 0])
    assert single["half"]["dtd"] is None
    page = base_to_new_page(None, [single], "about")
    assert "| dtd | `coop` | 80.0 | 50.0 | 61.5 |" in page
    assert "average" not in page


def test_compare_tests_each_method_on_new_classes(tmp_path: Path) -> None:
    dataset(tmp_path / "data" / "oxford_pets")
    config = CompareConfig(
        data=str(tmp_path / "data"), model="bundled_clip", methods="coop(tokens=2)", protocol="coop", base_to_new=True,
        shots=(1,), seeds=1, epochs=1, batch=3, workers=1, out=tmp_path / "out",
    )  # fmt: skip
    out = compare(config)
    table = {record["row"]: record["tasks"] for record in json.loads((out / "protocol.json").read_text())["table"]}
    assert set(table) == {"zero_shot", "coop(tokens=2)"}
    results = json.loads((out / "oxford_pets" / "base-to-new-1-shots-1" / "results.json").read_text())
    assert results["data"]["classes"] == ["boxer", "tabby cat", "zebra"]
    for run in results["runs"]:
        assert run["new_accuracy"] == table[run["row"]]["oxford_pets"]["new"]
        assert run["new_accuracy"] * 4 == pytest.approx(round(run["new_accuracy"] * 4)), "four images of new classes"
        assert run["test_accuracy"] * 6 == pytest.approx(round(run["test_accuracy"] * 6)), "six images of base classes"
    assert (out / "protocol.md").read_text().count("| average |") == 2
    before = (out / "protocol.json").read_text()
    assert compare(config) == out
    assert json.loads((out / "protocol.json").read_text())["table"] == json.loads(before)["table"]


def test_compare_splits_the_classes_of_any_folder(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("validation", 1), ("test", 2)):
        for label, name in enumerate(sorted(ORDER)):
            for number in range(count):
                save(tmp_path / "toy" / split / name / f"{number}.png", 32, 32, seed=10 * label + number)
    config = CompareConfig(
        data=str(tmp_path / "toy"), model="bundled_clip", methods="coop(tokens=2)", base_to_new=True, shots=(2,), seeds=2,
        epochs=1, batch=3, workers=1, out=tmp_path / "out",
    )  # fmt: skip
    out = compare(config)
    table = {record["row"]: record for record in json.loads((out / "base_to_new.json").read_text())["table"]}
    assert set(table) == {"zero_shot", "coop(tokens=2)"}
    results = [json.loads((out / f"2-shots-{seed}" / "results.json").read_text()) for seed in (0, 1)]
    assert results[0]["data"]["classes"] == ["apple", "beagle", "boxer"]
    assert results[0]["data"]["split_digest"] != results[1]["data"]["split_digest"]
    for number, run in enumerate(results[0]["runs"]):
        new = [each["runs"][number]["new_accuracy"] for each in results]
        assert table[run["row"]]["tasks"]["toy"]["new"] == pytest.approx(sum(new) / 2)
        assert run["new_accuracy"] * 4 == pytest.approx(round(run["new_accuracy"] * 4)), "four images of new classes"
        assert table[run["row"]]["half"]["toy"] is not None
    assert "| toy | `coop(tokens=2)` |" in (out / "base_to_new.md").read_text()
