"""A task adapter on top of the adapter of a domain: trained, saved with it, and the domain exchanged in `veneer predict`."""

from __future__ import annotations

import json
import shutil
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
from veneer.formats._core.stored_adapters import read_native, read_stored, write_native
from veneer.injection import LoadError, OptionError, UnknownName, attachments

Runs = tuple[Path, Path, Path, Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Images, the domain adapters of a run of all classes and of a file, and a task adapter of two classes on the first one."""
    folder = tmp_path_factory.mktemp("stacked")
    images, model = image_folder(folder / "images", count=8), str(model_folder(folder, "vit"))
    two = folder / "two"
    for name in CLASSES[:2]:
        shutil.copytree(images / name, two / name)

    def run(name: str, data: Path, method: str, **options: Any) -> Path:
        config = TransferConfig(
            data=str(data), model=model, method=method, out=folder / name, epochs=1, batch=16, learning_rate=1e-2, **options
        )
        return transfer(config)

    domain = run("domain", images, "mad_x")
    file = read_native(domain)
    states = [{key: -2 * tensor for key, tensor in state.items()} for state in file.states]
    other = write_native(folder / "other.safetensors", file.header, file.entries, states)
    return images, domain, other, run("task", two, "adapter_drop", with_=(str(domain),))


def test_the_domain_adapter_stays_and_is_saved(runs: Runs) -> None:
    _, domain, _, task = runs
    fixed, trained, head = read_stored(task)
    assert [each.method.name for each in (fixed, trained, head)] == ["mad_x", "adapter_drop", "linear_probe"]
    before = read_stored(domain)[0]
    assert before.sites == fixed.sites
    assert all(torch.equal(before.tensors[key], tensor) for key, tensor in fixed.tensors.items())
    assert {len(tensor) for tensor in head.tensors.values()} == {2}


def test_the_domain_is_exchanged(runs: Runs) -> None:
    images, _, other, task = runs
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    by_hand, exchanged = open_predictor(task), open_predictor(task, exchange={"mad_x": other})
    before = by_hand.logits(pixels)
    attachments(by_hand.classifier.model)[0].load_state_dict(read_stored(other)[0].tensors)
    assert torch.equal(exchanged.logits(pixels), by_hand.logits(pixels))
    assert not torch.equal(exchanged.logits(pixels), before)
    lines = [[*predict(PredictConfig(task, (images,), exchange=given))] for given in ((), (f"mad_x={other}",))]
    assert len(lines[0]) == len(lines[1])
    assert lines[0] != lines[1]
    with raises(UnknownName, name="x", expected=("mad_x", "adapter_drop", "linear_probe")):
        open_predictor(task, exchange={"x": other})
    with raises(OptionError, option="exchange", given="mad_x"):
        PredictConfig(task, exchange=("mad_x",))


def test_the_strength_of_a_fixed_adapter_is_saved(runs: Runs, tmp_path: Path) -> None:
    """Also below another run, where strengths multiply; a file with a head only cannot be trained on."""
    _, domain, _, task = runs
    data, model = task.parent / "two", json.loads((task / "model.json").read_text("utf-8"))["model"]
    common: dict[str, Any] = {"data": str(data), "model": model, "epochs": 1, "batch": 16}
    half = transfer(TransferConfig(**common, method="adapter_drop", with_=(f"{domain}:0.5",), out=tmp_path / "half"))
    quarter = transfer(TransferConfig(**common, method="ssf", with_=(str(domain), f"{half}:0.5"), out=tmp_path / "quarter"))
    for run, expected in ((task, [1, 1, 1]), (half, [0.5, 1, 1]), (quarter, [1, 0.25, 0.5, 1, 1])):
        assert [a.scale for a in attachments(open_predictor(run).classifier.model)] == expected
    head = transfer(TransferConfig(**common, method="linear_probe", out=tmp_path / "head"))
    with raises(LoadError, file=str(head), where="attachments"):
        transfer(TransferConfig(**common, method="ssf", with_=(str(head),), out=tmp_path / "none"))


def test_layers_are_skipped(runs: Runs) -> None:
    """Adapters of the task in the last block only; the domain adapter has no layers to skip."""
    images, domain, _, task = runs
    lines = [[*predict(PredictConfig(task, (images,), skip_layers=n, format="json"))] for n in (0, 1)]
    assert lines[0] != lines[1]
    with raises(OptionError, option="skip_layers", given=("mad_x", "linear_probe"), expected="adapter_drop"):
        [*predict(PredictConfig(domain, (images,), skip_layers=1))]
