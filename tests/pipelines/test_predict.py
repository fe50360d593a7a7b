"""`veneer predict` on lists of images, on a device, and as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from veneer.pipelines.predict import PredictConfig, predict
from veneer.pipelines.transfer import transfer

from tests.classification.small import CLASSES, image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.predict import open_predictor
from veneer.cli import main
from veneer.injection import OptionError, VeneerError
from veneer.injection.errors import BaseModelError
from veneer.testing.simulated_accelerator import DEVICE, simulated_accelerator


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = model_folder(folder, "vit")
    return transfer(
        TransferConfig(data=str(images), model=str(model), out=folder / "lora", epochs=3, learning_rate=2e-2, batch=8)
    )


def records(run: Path, *images: Path, **options: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in predict(PredictConfig(run, images, format="json", **options))]


def names(found: list[dict[str, Any]]) -> list[str]:
    return [record["image"] for record in found]


def test_lists_from_a_file_and_from_stdin(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(images)
    (tmp_path / "list.txt").write_text("\ufeffred/0.png\n\n  blue\n")
    expected = ["red/0.png", *(str(path) for path in sorted(Path("blue").iterdir()))]
    assert names(records(run, tmp_path / "list.txt")) == expected
    assert names(records(run, Path("green/1.png"), tmp_path / "list.txt")) == ["green/1.png", *expected]
    monkeypatch.setattr("sys.stdin", io.StringIO("red/0.png\nred/1.png\n"))
    assert main(["predict", str(run), "-", "--format", "json"]) == 0
    assert names([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == ["red/0.png", "red/1.png"]


def test_errors_of_lists_name_the_line(run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{images / 'red'}\n\n{images / 'gone.png'}\n")
    with raises(VeneerError, where=f"{listed}, line 3", file=images / "gone.png", given="missing"):
        records(run, listed)
    listed.write_text("\n")
    with raises(VeneerError, where=str(listed), given=()):
        records(run, listed)
    listed.write_bytes(b"\xff\xfe\x00")
    with raises(VeneerError, file=listed, given="no UTF-8"):
        records(run, listed)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with raises(VeneerError, where="stdin", given=()):
        records(run, Path("-"))


def test_csv_has_all_top_classes_and_a_cell_for_each_column(run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = (images / "red" / "0.png", tmp_path / "broken.png")
    expected = records(run, *files)
    rows = list(csv.reader(predict(PredictConfig(run, files, format="csv", top=99))))
    assert rows[0] == ["image", "label", "probability", "problem", "label_2", "probability_2", "label_3", "probability_3"]
    assert {len(row) for row in rows} == {len(rows[0])}
    ((second, share), (third, rest)) = expected[0]["others"]
    assert rows[1] == [
        str(files[0]),
        expected[0]["label"],
        repr(expected[0]["probability"]),
        "",
        second,
        repr(share),
        third,
        repr(rest),
    ]
    assert {expected[0]["label"], second, third} == {*CLASSES}
    assert expected[0]["probability"] + share + rest == pytest.approx(1)
    assert rows[2] == [str(files[1]), "", "", expected[1]["problem"], "", "", "", ""]
    assert [len(row) for row in csv.reader(predict(PredictConfig(run, files, format="csv", top=1)))] == [4, 4, 4]


def test_any_batch_size_gives_the_same_predictions(run: Path, images: Path) -> None:
    whole = records(run, images, batch=64)
    assert len(whole) == 36
    for one, other in zip(whole, records(run, images, batch=5), strict=True):
        assert (one["image"], one["label"]) == (other["image"], other["label"])
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_a_device_gives_the_predictions_of_the_cpu(run: Path, images: Path) -> None:
    expected = records(run, images / "red", device="cpu")
    with simulated_accelerator() as accelerator:
        found = records(run, images / "red", device=DEVICE)
        assert open_predictor(run, DEVICE).device == torch.device(DEVICE)
    assert accelerator.peak_bytes > 0
    assert [record["label"] for record in found] == [record["label"] for record in expected]
    assert [r["probability"] for r in found] == pytest.approx([r["probability"] for r in expected], abs=1e-5)


def test_invalid_options(run: Path, images: Path) -> None:
    with raises(BaseModelError, where="device", given="tpu9"):
        records(run, images, device="tpu9")
    for name in ("top", "batch"):
        with raises(OptionError, option=name, given=0):
            PredictConfig(run, (images,), **{name: 0})  # type: ignore[arg-type]
