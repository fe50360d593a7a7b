"""Images with several labels: tables, splits, loss and metrics against scikit-learn, and a run from table to export."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn import metrics as reference
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from veneer.pipelines.compare import CompareConfig, compare
from veneer.pipelines.export import ExportConfig, export
from veneer.pipelines.predict import PredictConfig, predict
from veneer.pipelines.transfer import transfer

from tests.classification.small import CLASSES, color_table, image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.data.hf_dataset import _classes, _columns
from veneer.classification.data.labeled_images import Example, Source
from veneer.classification.data.multi_label.label_cells import LabelCellError, parse_labels
from veneer.classification.data.multi_label.stratification import stratify
from veneer.classification.data.sources import open_source
from veneer.classification.data.split_files import load_splits, save_splits
from veneer.classification.data.splits import split
from veneer.classification.models.linear_probe_init import _fit, solve_head
from veneer.classification.objectives.multi_label import MULTI_LABEL
from veneer.classification.objectives.multi_label_metrics import image_ranking_precision
from veneer.classification.train.batches import ClassifyingLoss, Order
from veneer.classification.train.mixing import Mixing
from veneer.injection.errors import OptionError
from veneer.publishing.run_record import read_run
from veneer.publishing.tables import score_rows
from veneer.training.data.image_io import DataError


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("cat", ("cat",)),
        ("cat;dog", ("cat", "dog")),
        ("cat | dog;;cat;", ("cat", "dog")),
        ('["hot;dog", "cat"]', ("hot;dog", "cat")),
    ],
)
def test_labels_of_a_cell(cell: str, labels: tuple[str, ...]) -> None:
    assert parse_labels(cell, multi_label=True) == labels


@pytest.mark.parametrize(
    ("cell", "multi_label", "expected"),
    [("", True, "label"), (" ; ", True, "label"), ("[cat", True, "JSON list"), ('["cat"]', False, "label"), ("", False, "label")],
)
def test_cells_that_are_no_labels(cell: str, multi_label: bool, expected: str) -> None:
    with raises(LabelCellError, given=cell, expected=expected):
        parse_labels(cell, multi_label)


def labels_of(source: Source) -> dict[str, str]:
    return {each.name: source.label_text(each) for each in source.examples}


def test_a_table_of_several_labels(tmp_path: Path) -> None:
    image_folder(tmp_path, 2)
    (tmp_path / "table.csv").write_text("path,label\nred/0.png,warm;red\nblue/0.png,blue\ngreen/1.png,green|warm\n")
    source = open_source(tmp_path / "table.csv", multi_label=True)
    assert source.classes == ("blue", "green", "red", "warm")
    assert labels_of(source) == {"red/0.png": "red|warm", "blue/0.png": "blue", "green/1.png": "green|warm"}
    assert source.counts() == {"blue": 1, "green": 1, "red": 1, "warm": 2}
    assert source.filter(lambda each: each.name != "red/0.png").classes == ("blue", "green", "warm")
    assert labels_of(source.without_labels({3, 0})) == {"red/0.png": "red", "green/1.png": "green"}
    single = open_source(tmp_path / "table.csv")
    assert single.classes == ("blue", "green|warm", "warm;red")
    assert len(single.notes) == 1


def test_without_a_header_semicolons_separate_labels_not_columns(tmp_path: Path) -> None:
    image_folder(tmp_path, 1)
    (tmp_path / "table.csv").write_text("red/0.png,a;b;c\nblue/0.png,b\n")
    assert open_source(tmp_path / "table.csv", multi_label=True).classes == ("a", "b", "c")


def test_metadata_with_lists_needs_the_option(tmp_path: Path) -> None:
    image_folder(tmp_path, 1)
    rows = [{"file_name": "red/0.png", "labels": ["a", "b"]}, {"file_name": "blue/0.png", "labels": ["b"]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert labels_of(open_source(tmp_path, multi_label=True)) == {"red/0.png": "a|b", "blue/0.png": "b"}
    with raises(DataError, file=tmp_path / "metadata.jsonl", where="lines") as caught:
        open_source(tmp_path)
    assert caught.value.given[0].expected == "label"


def test_cells_of_parquet_files_are_lists() -> None:
    of_list = {"_type": "Sequence", "feature": {"_type": "ClassLabel", "names": ["a", "b"]}}
    info = {"info": {"features": {"image": {"_type": "Image"}, "labels": of_list}}}
    schema = SimpleNamespace(names=["image", "labels"], metadata={b"huggingface": json.dumps(info).encode()})
    columns = _columns(Path("train.parquet"), schema)
    assert columns == ("image", "labels", ["a", "b"])
    assert _classes(Path("train.parquet"), "row", [1, 0, 1], columns.names, multi_label=True) == ("b", "a")
    assert _classes(Path("train.parquet"), "row", "a|b", None, multi_label=True) == ("a", "b")
    assert _classes(Path("train.parquet"), "row", "a|b", None, multi_label=False) == ("a|b",)
    for label, multi_label in (([1, 0], False), ([], True)):
        with raises(DataError, where="row", expected="label"):
            _classes(Path("train.parquet"), "row", label, columns.names, multi_label)


def test_folders_have_one_label_per_image(tmp_path: Path) -> None:
    for data in (image_folder(tmp_path, 1), "digits"):
        with raises(DataError, where="labels", expected="table"):
            open_source(data, multi_label=True)


def random_labels(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    shares = (0.5, 0.3, 0.2, 0.05, 0.02)
    return [[n for n, share in enumerate(shares) if rng.random() < share] or [rng.randrange(2)] for _ in range(count)]


def test_iterative_stratification_keeps_the_share_of_each_label() -> None:
    labels = random_labels(400)
    chosen = stratify(labels, (0.15, 0.1))
    assert chosen == stratify(labels, (0.15, 0.1))
    for number, share in ((0, 0.15), (1, 0.1), (None, 0.75)):
        images = [of_image for of_image, place in zip(labels, chosen, strict=True) if place == number]
        assert abs(len(images) - share * 400) <= 8
        for label in range(5):
            expected = share * sum(label in of_image for of_image in labels)
            assert abs(sum(label in of_image for of_image in images) - expected) <= max(2, 0.12 * expected), (number, label)


def test_rare_labels_are_in_every_split_as_far_as_possible() -> None:
    labels = [[0]] * 40 + [[0, 1]] * 3 + [[0, 2]] * 2 + [[3]]
    chosen = stratify(labels, (0.15, 0.1))
    places = [{chosen[i] for i, of_image in enumerate(labels) if label in of_image} for label in range(4)]
    assert places == [{None, 0, 1}, {None, 0, 1}, {None, 0}, {None}]


def test_the_rarest_label_is_distributed_first() -> None:
    """Its images come first; if the frequent label were distributed first, all of them would be training images."""
    labels = [[0, 1]] * 10 + [[0]] * 90
    chosen = stratify(labels, (0.15, 0.1))
    assert [chosen[:10].count(number) for number in (None, 0, 1)] == [8, 1, 1]
    assert [chosen.count(number) for number in (None, 0, 1)] == [75, 15, 10]


def labeled_source(labels: Sequence[Sequence[int]], bytes_of: dict[str, bytes] | None = None) -> Source:
    examples = tuple(Example(f"{i:03d}", of_image[0], None, tuple(of_image[1:])) for i, of_image in enumerate(labels))
    content = bytes_of or {}
    names = tuple(str(n) for n in range(max(itertools.chain(*labels)) + 1))
    return Source("labels", names, examples, lambda each: content.get(each.name, each.name.encode()), multi_label=True)


def test_copies_stay_together_and_the_seed_decides() -> None:
    labels = random_labels(80)
    copies = set(range(0, 60, 5))
    source = labeled_source(labels, {f"{i:03d}": b"same" for i in copies})
    splits = [split(source, seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0].test != splits[2].test
    for each in splits:
        assert sorted((*each.train, *each.validation, *each.test)) == list(range(80))
        assert any(copies <= set(part) for part in (each.train, each.validation, each.test))
    with raises(DataError, where="shots", given=4):
        split(source, 0, shots=4)


def test_saved_splits_are_those_of_the_same_labels(tmp_path: Path) -> None:
    labels = [*random_labels(20), [4]]
    splits = split(labeled_source(labels), 0)
    save_splits(splits, labeled_source(labels), tmp_path / "splits.json")
    assert load_splits(tmp_path / "splits.json", labeled_source(labels)).test == splits.test
    changed = [sorted({*of_image, 4}) for of_image in labels]
    with raises(DataError, where="pictures"):
        load_splits(tmp_path / "splits.json", labeled_source(changed))


def test_the_digest_depends_on_all_labels() -> None:
    one, other = (labeled_source([[0, 1], [0, *more]]) for more in ([], [1]))
    assert one.digest != other.digest
    assert split(one, 0, validation=0, test=0).digest != split(other, 0, validation=0, test=0).digest


def scores_and_targets(count: int = 50, classes: int = 6, step: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(count, classes, generator=generator)
    targets = (torch.rand(count, classes, generator=generator) < torch.linspace(0.1, 0.6, classes)).float()
    return ((scores / step).round() * step if step else scores), targets


@pytest.mark.parametrize("step", [0.0, 0.5])
def test_metrics_are_those_of_scikit_learn(step: float) -> None:
    """With a step, many scores are tied."""
    scores, targets = scores_and_targets(step=step)
    metrics = MULTI_LABEL.metrics(scores, targets)
    expected = [reference.average_precision_score(targets[:, c], scores[:, c]) for c in range(6)]
    assert metrics.average_precision == pytest.approx(expected)  # type: ignore[attr-defined]
    assert metrics.score == pytest.approx(reference.average_precision_score(targets, scores, average="macro"))
    predicted = scores.sigmoid() >= 0.5
    record = metrics.as_dict(list("abcdef"))
    assert record["micro_f1"] == pytest.approx(reference.f1_score(targets, predicted, average="micro"))
    assert record["macro_f1"] == pytest.approx(reference.f1_score(targets, predicted, average="macro"))
    assert record["average_precision"]["b"] == pytest.approx(expected[1])
    low, high = metrics.interval
    assert low < metrics.score < high < low + 0.5
    assert metrics.baseline().value == pytest.approx(float(targets.mean()))


def test_image_scores_are_the_label_ranking_average_precision() -> None:
    scores, targets = scores_and_targets()
    expected = reference.label_ranking_average_precision_score(targets, scores)
    assert sum(image_ranking_precision(scores, targets)) / 50 == pytest.approx(expected)


def test_a_class_without_images_has_no_average_precision() -> None:
    scores, targets = scores_and_targets()
    targets[:, 2], scores[:, 2] = 0, -9
    metrics = MULTI_LABEL.metrics(scores, targets)
    others = [c for c in range(6) if c != 2]
    macro = reference.f1_score(targets[:, others], scores[:, others] >= 0, average="macro")
    assert metrics.as_dict(list("abcdef"))["macro_f1"] == pytest.approx(macro)
    assert metrics.as_dict(list("abcdef"))["average_precision"]["c"] is None
    assert metrics.score == pytest.approx(reference.average_precision_score(targets[:, others], scores[:, others]))


def test_the_loss_is_the_stated_formula() -> None:
    logits, targets = scores_and_targets()
    weights = MULTI_LABEL.class_weights(targets, 6)
    torch.testing.assert_close(weights, (50 - targets.sum(0)) / targets.sum(0))
    smoothed = 0.9 * targets + 0.05
    expected = -(weights * smoothed * logsigmoid(logits) + (1 - smoothed) * logsigmoid(-logits)).mean()
    torch.testing.assert_close(MULTI_LABEL.loss(logits, targets, 0.1, weights), expected)
    constant = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert MULTI_LABEL.class_weights(constant, 2).tolist() == [1.0, 1.0]


def test_mixup_mixes_targets() -> None:
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = scores_and_targets(8, 3)[1]
    head = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    mixing, order = Mixing(mixup=1.0, seed=2), Order(range(8), seed=1)

    def inputs(samples: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([index for _, index in samples])
        return images[rows], targets[rows]

    weights = MULTI_LABEL.class_weights(targets, 3)
    loss = ClassifyingLoss(head, inputs, order, 8, smoothing=0.1, class_weights=weights, mixing=mixing, objective=MULTI_LABEL)
    x, y = inputs([order.at(row) for row in range(8)])
    partners = [row ^ 1 for row in range(8)]
    mixed, share = mixing(x, x[partners], 0, range(8))
    soft = share[:, None] * y + (1 - share[:, None]) * y[partners]
    torch.testing.assert_close(loss(0, list(range(8))), MULTI_LABEL.loss(head(mixed), soft, 0.1, weights))


def test_the_probe_is_one_logistic_regression_per_class() -> None:
    x, y = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)), scores_and_targets(40, 3)[1]
    weight, bias = _fit(x, y, torch.zeros(3, 5), torch.zeros(3), 0.01, MULTI_LABEL)
    for c in range(3):
        alone = _fit(x, y[:, c : c + 1], torch.zeros(1, 5), torch.zeros(1), 0.03, MULTI_LABEL)
        torch.testing.assert_close((weight[c], bias[c]), (alone[0][0], alone[1][0]), atol=2e-3, rtol=1e-2)
    solved = solve_head((x, y), (x, y), 3, MULTI_LABEL)
    logits = x @ solved[0].T + solved[1]
    assert MULTI_LABEL.loss(logits, y) < MULTI_LABEL.loss(torch.zeros_like(logits), y)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"method": "ilm_vp"}, "method"),
        ({"method": "evp"}, "method"),
        ({"method": "lora+tip_adapter"}, "method"),
        ({"method": "coop", "model": "bundled_clip"}, "model"),
        ({"method": "zero_shot", "model": "bundled_clip"}, "model"),
        ({"head": "kept"}, "head"),
        ({"shots": 4}, "shots"),
    ],
)
def test_what_needs_one_label_per_image_is_an_error(options: dict[str, Any], option: str, tmp_path: Path) -> None:
    with raises(OptionError, option=option):
        TransferConfig(multi_label=True, out=tmp_path, **options).with_defaults()
    TransferConfig(out=tmp_path, **options).with_defaults()


def test_rows_of_a_comparison_are_checked_first(tmp_path: Path) -> None:
    with raises(OptionError, option="method", given="evp"):
        compare(CompareConfig(data="missing.csv", multi_label=True, methods="lora, evp", out=tmp_path / "out"))
    with raises(OptionError, option="multi_label", given=True):
        CompareConfig(data=str(tmp_path), protocol="fgvc", multi_label=True).with_defaults()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multi")
    return transfer(
        TransferConfig(
            data=str(color_table(folder / "images")), multi_label=True, model=str(model_folder(folder, "vit")), lp_ft=True,
            method="linear_probe", class_weights="balanced", epochs=2, batch=8, out=folder / "run",
        )
    )  # fmt: skip


def test_a_run_reports_average_precision(run: Path) -> None:
    record = json.loads((run / "result.json").read_text())
    chance = record["test"]["images_of_class"]
    shares = [count / record["test"]["pictures"] for count in chance.values()]
    assert record["test_map"] == record["test"]["map"] > max(shares)
    assert record["val_map"] == record["validation"]["map"] == max(each["val_accuracy"] for each in record["epochs"])
    assert "test_accuracy" not in record
    assert record["verdict"]["outcome"] == "learned"
    assert score_rows(read_run(run))[0][0][:2] == ("test mean average precision", f"{record['test_map']:.1%}")
    for name in ("average_precision", "curves", "mistakes"):
        with Image.open(run / f"{name}.png") as figure:
            assert figure.width > 200
    assert not (run / "confusion.png").exists()


def test_prediction_lists_labels_above_one_half(run: Path) -> None:
    images = tuple(sorted((run.parent / "images").glob("*.png"))[:12])
    for line in predict(PredictConfig(run, images, format="json", top=3)):
        record = json.loads(line)
        probabilities = {record["label"]: record["probability"], **dict(record["others"])}
        assert dict(record["labels"]) == {name: p for name, p in probabilities.items() if p >= 0.5}
    several = [json.loads(line)["labels"] for line in predict(PredictConfig(run, images, format="json"))]
    assert {len(labels) for labels in several} > {1}
    texts = list(predict(PredictConfig(run, images)))
    assert [text.count("%") for text in texts if "no label" not in text] == [len(labels) for labels in several if labels]
    header, *rows = predict(PredictConfig(run, images, format="csv"))
    assert header.split(",")[-1] == "labels"
    assert [row.split(",")[-1] for row in rows] == [";".join(name for name, _ in labels) for labels in several]


def test_exports_say_that_classes_are_independent(run: Path) -> None:
    list(export(ExportConfig(run, to="timm", out=run / "timm")))
    config = json.loads((run / "timm" / "config.json").read_text())
    assert (config["problem_type"], config["activation"]) == ("multi_label_classification", "sigmoid")
    assert config["label_names"] == list(CLASSES)


def test_a_comparison_has_a_column_of_mean_average_precision(run: Path) -> None:
    config = CompareConfig(
        data=str(run.parent / "images" / "labels.csv"), multi_label=True, model=str(run.parent / "vit"), methods="linear_probe",
        seeds=1, epochs=1, batch=8, lp_ft=True, out=run.parent / "compared",
    )  # fmt: skip
    out = compare(config)
    record = json.loads((out / "results.json").read_text())
    assert record["metric"] == MULTI_LABEL.metric
    assert 0.5 < record["runs"][0]["test_accuracy"] <= 1
    assert "| test mAP, % |" in (out / "compare.md").read_text()
