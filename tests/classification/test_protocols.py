"""Benchmark folders, their splits and few-shot samples, the table of a protocol, and runs of `veneer compare --protocol`."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from veneer.pipelines.compare import CompareConfig, compare

from tests.classification.small import model_folder
from tests.raising import raises
from tests.training.images import save
from veneer.classification.data.labeled_images import Source
from veneer.classification.data.sources import open_source
from veneer.classification.protocols.benchmark_tasks import COOP, FGVC, SHOTS, VTAB
from veneer.classification.protocols.protocol_table import TaskRun, protocol_page, summarize
from veneer.classification.protocols.task_data import open_task, sample_shots
from veneer.injection.errors import OptionError
from veneer.training.data.image_io import DataError


def vtab_task(root: Path, labels: Sequence[int] = (0, 2), test: Sequence[int] = (0, 2, 10)) -> Path:
    """A task with 4 training and 2 validation images of each label, and 2 test images."""
    for name, count, classes in (("train800", 4, labels), ("val200", 2, labels), ("test", 2, test)):
        folder = "test" if name == "test" else "train800val200"
        lines = []
        for label in classes:
            for number in range(count):
                path = f"images/{folder}/{name}-{label}-{number}.jpg"
                save(root / path, 32, 32, seed=100 * label + number)
                lines.append(f"{path} {label}\n")
        (root / f"{name}.txt").write_text("".join(lines))
    (root / "train800val200.txt").write_text((root / "train800.txt").read_text() + (root / "val200.txt").read_text())
    return root


def coop_dataset(root: Path, folder: str = "images", each: int = 6) -> Path:
    """Three classes with `each` training, 3 validation and 2 test images, in an order other than by name."""
    table: dict[str, list[Any]] = {}
    for split, count in (("train", each), ("val", 3), ("test", 2)):
        table[split] = []
        for number in range(count):
            for label, name in ((2, "tabby_cat"), (0, "beagle"), (1, "boxer")):
                path = f"{name}/{split}_{number}.png"
                save(root / folder / path, 32, 32, seed=10 * label + number)
                table[split].append([path, label, name])
    (root / "split_zhou_OxfordPets.json").write_text(json.dumps(table))
    return root


def names(source: Source, indices: Sequence[int]) -> set[str]:
    return {source.examples[i].name for i in indices}


def test_vtab_folders_are_read_with_the_search_and_the_final_splits(tmp_path: Path) -> None:
    source = open_source(vtab_task(tmp_path / "cifar"))
    assert source.classes == ("00", "02", "10")
    assert source.counts("train") == {"00": 4, "02": 4, "10": 0}
    search, final = open_task(VTAB, tmp_path / "cifar")
    assert [len(s) for s in (search.splits.train, search.splits.validation, search.splits.test)] == [8, 4, 6]
    assert not set(search.splits.train) & set(search.splits.validation)
    assert set(final.splits.train) == {*search.splits.train, *search.splits.validation}
    assert final.splits.test == search.splits.test, "a class without training images stays in the test split"
    assert final.splits.digest != search.splits.digest


def test_fgvc_folders_are_read(tmp_path: Path) -> None:
    for split, labels in (("train", (1, 9, 10)), ("val", (1,)), ("test", (9,))):
        table = {f"a/{split}{label}.png": label for label in labels}
        for path in table:
            save(tmp_path / "CUB" / "images" / path, 32, 32)
        (tmp_path / "CUB" / f"{split}.json").write_text(json.dumps(table))
    assert FGVC.tasks(tmp_path) == {"CUB_200_2011": tmp_path / "CUB"}
    source = open_source(tmp_path / "CUB")
    assert source.classes == ("01", "09", "10")
    search, final = open_task(FGVC, tmp_path / "CUB")
    assert search is final
    assert names(source, final.splits.validation) == {"images/a/val1.png"}
    assert names(source, final.splits.test) == {"images/a/test9.png"}


def test_coop_splits_are_read_with_spaces_in_names(tmp_path: Path) -> None:
    source = open_source(coop_dataset(tmp_path))
    assert source.classes == ("beagle", "boxer", "tabby cat")
    assert source.counts("train") == dict.fromkeys(source.classes, 6)
    assert "images/tabby_cat/test_1.png" in {each.name for each in source.examples}


def test_aircraft_lists_are_read(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        save(tmp_path / "images" / f"{split}1.jpg", 32, 32)
        (tmp_path / f"images_variant_{split}.txt").write_text(f"{split}1 Cessna 172\n")
    assert open_source(tmp_path).counts("test") == {"Cessna 172": 1}


def test_few_shot_samples_are_those_of_the_authors_code(tmp_path: Path) -> None:
    root = coop_dataset(tmp_path)
    table = json.loads((root / "split_zhou_OxfordPets.json").read_text())
    table["train"] = table["train"][:9] + [row for row in table["train"][9:] if row[2] != "tabby_cat"]  # three of the first class
    (root / "split_zhou_OxfordPets.json").write_text(json.dumps(table))
    generator, expected = random.Random(2), set()
    for split, count in (("train", 4), ("val", 4)):
        by_label: dict[int, list[str]] = {}
        for path, label, _ in table[split]:
            by_label.setdefault(label, []).append(f"images/{path}")
        for images in by_label.values():
            if len(images) >= count:
                expected |= set(generator.sample(images, count))
            else:
                generator.choices(images, k=count)
                expected |= set(images)
    assert sample_shots(root, 4, seed=2) == expected
    assert sample_shots(root, 4, seed=1) != expected
    data, _ = open_task(COOP, root, shots=4, seed=2)
    assert (len(data.splits.train), len(data.splits.validation), len(data.splits.test)) == (11, 9, 6)
    assert names(data.source, data.splits.train) | names(data.source, data.splits.validation) == expected


def test_invalid_benchmark_files(tmp_path: Path) -> None:
    task = vtab_task(tmp_path / "cifar")
    with raises(DataError, file=tmp_path / "other", where="tasks"):
        VTAB.tasks(tmp_path / "other")
    (task / "images" / "test" / "test-0-0.jpg").unlink()
    with raises(DataError, file=task, where="images", given=("images/test/test-0-0.jpg",)):
        open_source(task)
    (task / "val200.txt").write_text("images/a.jpg cat\n")
    with raises(DataError, file=task / "val200.txt", where="line 1", given="images/a.jpg cat"):
        open_source(task)
    (tmp_path / "split_zhou_A.json").write_text(json.dumps({"train": [["a.png", 0, "cat"]]}))
    with raises(DataError, file=tmp_path / "split_zhou_A.json"):
        open_source(tmp_path)
    for row in (["a.png", 0, 7], [3, 0, "cat"]):
        (tmp_path / "split_zhou_A.json").write_text(json.dumps({"train": [row], "val": [], "test": []}))
        with raises(DataError, file=tmp_path / "split_zhou_A.json"):
            open_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with raises(DataError, file=tmp_path / "empty", where="splits", expected="coop"):
        open_task(COOP, tmp_path / "empty")


def test_numbers_of_fgvc_are_whole(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.json").write_text('{"a.png": 1}' if split != "val" else '{"b.png": NaN}')
    with raises(DataError, file=tmp_path / "val.json", where="b.png", given="nan"):
        open_source(tmp_path)


@pytest.mark.parametrize("path", ["../secret.png", "/secret.png", "images/../../secret.png"])
def test_paths_outside_the_folder_are_rejected(tmp_path: Path, path: str) -> None:
    save(tmp_path / "secret.png", 32, 32)
    path = str(tmp_path / "secret.png") if path.startswith("/") else path
    for split in ("train", "val", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps({path: 1}))
    with raises(DataError, file=tmp_path / "data", where="paths", given=(path,) * 3):
        open_source(tmp_path / "data")


def test_empty_splits_of_a_task_are_rejected(tmp_path: Path) -> None:
    root = coop_dataset(tmp_path)
    table = json.loads((root / "split_zhou_OxfordPets.json").read_text())
    for key, name in (("val", "validation"), ("test", "test")):
        (root / "split_zhou_OxfordPets.json").write_text(json.dumps({**table, key: []}))
        with raises(DataError, file=root, where=name, given=0):
            open_task(COOP, root, shots=2, seed=1)


def test_table_has_means_of_tasks_groups_and_groups_of_means() -> None:
    accuracies = {"cifar": (0.5, 0.7), "dtd": (0.3, 0.3), "eurosat": (0.9, 0.8), "kitti": (0.4, 0.2)}
    runs = [TaskRun(task, "lora", seed, None, a) for task, each in accuracies.items() for seed, a in enumerate(each)]
    (record,) = summarize(VTAB, runs)
    assert record["tasks"]["cifar"] == pytest.approx(0.6)
    assert record["groups"] == pytest.approx({"natural": 0.45, "specialized": 0.85, "structured": 0.3})
    assert record["mean_of_groups"] == pytest.approx(1.6 / 3), "not the mean of the tasks, 2.05 / 4"
    seeds = (0.4 + 0.9 + 0.4) / 3, (0.5 + 0.8 + 0.2) / 3
    assert record["half"] == pytest.approx(12.7062 * abs(seeds[0] - seeds[1]) / 2, rel=1e-4)
    page = protocol_page(VTAB, [record], "about")
    assert "| method | cifar | dtd | eurosat | kitti | natural | specialized | structured | mean of groups |" in page
    assert "| `lora` | 60.0 | 30.0 | 85.0 | 30.0 | 45.0 | 85.0 | 30.0 | 53.3 ± 42.4 |" in page
    assert "Without caltech101" in page
    (partial,) = summarize(VTAB, [run for run in runs if run.task != "kitti"])
    assert partial["mean_of_groups"] is None


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        ("shots", (1,), ()), ("augment", "strong", "none"), ("validation", 0.3, 0.1), ("split_seed", 1, 0),
        ("data", None, "folder"), ("data", "digits", "folder"),
    ],
)  # fmt: skip
def test_options_that_a_protocol_sets_are_rejected(option: str, given: object, expected: object) -> None:
    options: dict[str, Any] = {"data": "vtab", "protocol": "vtab-1k", option: given}
    with raises(OptionError, option=option, given=given, expected=expected):
        CompareConfig(**options).with_defaults()


def test_the_config_of_a_protocol_is_accepted_again() -> None:
    config = CompareConfig(data="vtab", protocol="vtab-1k").with_defaults()
    assert (config.augment, config.epochs) == ("none", 100)
    assert config.with_defaults() == config
    assert CompareConfig(data="coop", protocol="coop", shots=(4,)).with_defaults().shots == (4,)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), "vit")


def test_compare_fills_the_table_of_vtab(tmp_path: Path, model: Path) -> None:
    for task in ("cifar", "eurosat", "kitti"):
        vtab_task(tmp_path / "vtab" / task)
    options: dict[str, Any] = {"data": str(tmp_path / "vtab"), "model": str(model), "methods": "linear_probe", "workers": 1}
    options |= {"protocol": "vtab-1k", "out": tmp_path / "out"}
    out = compare(CompareConfig(epochs=2, batch=4, seeds=1, search=2, search_epochs=1, **options))
    table = json.loads((out / "protocol.json").read_text())["table"]
    assert [record["row"] for record in table] == ["linear_probe"]
    assert table[0]["mean_of_groups"] is not None
    result = json.loads((out / "cifar" / "results.json").read_text())
    assert (result["config"]["augment"], result["config"]["squash"], result["config"]["keep_epoch"]) == ("none", True, "last")
    assert result["runs"][0]["chosen_epoch"] == 2
    assert {trial["round"] for trial in result["search"]["linear_probe"]} == {1, 2, 3}
    assert "12 training, 4 validation and 6 test" in (out / "cifar" / "compare.md").read_text()
    assert (out / "protocol.md").read_text().count("| `linear_probe` |") == 1


def test_compare_samples_the_shots_of_coop_with_each_seed(tmp_path: Path, model: Path) -> None:
    coop_dataset(tmp_path / "data" / "oxford_pets")
    config = CompareConfig(
        data=str(tmp_path / "data"), model=str(model), methods="linear_probe", protocol="coop", shots=(2,), seeds=2, epochs=1,
        batch=4, workers=1, out=tmp_path / "out",
    )  # fmt: skip
    out = compare(config)
    splits = [json.loads((out / "oxford_pets" / f"2-shots-{s}" / "results.json").read_text())["data"] for s in (1, 2)]
    assert splits[0]["split_digest"] != splits[1]["split_digest"]
    (record,) = json.loads((out / "protocol.json").read_text())["table"]
    assert (record["shots"], record["half"] is not None) == (2, True)
    assert SHOTS == (1, 2, 4, 8, 16)
