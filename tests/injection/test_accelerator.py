"""Attachments in use on a simulated accelerator: conditions from the CPU, merging, switching, mixed batches, classification."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from veneer.pipelines.transfer import TransferConfig, transfer

import veneer
from tests.accelerators import accelerator_on
from tests.injection.test_mixed_batch_rows import WHERE, Net, inputs
from veneer.injection import Attachment, attach
from veneer.testing.case import perturb
from veneer.testing.pipelines import tiny_pipeline
from veneer.testing.simulated_accelerator import DEVICE, DeviceMismatch, on_device, simulated_accelerator


@pytest.fixture(autouse=True)
def _accelerator() -> Iterator[None]:
    with simulated_accelerator():
        yield


def net(*ranks: int) -> tuple[Net, list[Attachment]]:
    torch.manual_seed(0)
    model = Net().eval()
    attached = [attach(model, "lora", where=WHERE, rank=rank, name=f"rank{rank}") for rank in ranks]
    for number, attachment in enumerate(attached):
        perturb(attachment, number)
    return model, attached


def output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).cpu()


def test_merging_and_detaching_on_the_device() -> None:
    model, (lora,) = net(2)
    given = inputs(2)
    expected = output(model, given)
    model.to(DEVICE)
    lora.merge()
    torch.testing.assert_close(output(model, on_device(given)), expected, rtol=1e-4, atol=1e-5)
    lora.unmerge()
    lora.detach()
    bare = net()[0].state_dict()
    assert all(torch.equal(tensor.cpu(), bare[name]) for name, tensor in model.state_dict().items())


def test_switching_and_strength_on_the_device() -> None:
    model, attached = net(1, 2)
    given = inputs(2)
    expected = []
    for device in ("cpu", DEVICE):
        model.to(device)
        moved = given if device == "cpu" else on_device(given)
        outputs = []
        for active in attached:
            for attachment in attached:
                attachment.scale = 0.7 if attachment is active else 0.0
            outputs.append(output(model, moved))
        expected.append(torch.stack(outputs))
    torch.testing.assert_close(expected[1], expected[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0][0], expected[0][1])


def test_a_mixed_batch_on_the_device() -> None:
    model, (first, second) = net(1, 2)
    given, samples = inputs(2), [{first.name: 1.0}, {second.name: 0.5}]
    outputs = []
    for device in ("cpu", DEVICE):
        model.to(device)
        with veneer.mixed(model, samples):
            outputs.append(output(model, given if device == "cpu" else on_device(given)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["controlnet", "t2i_adapter", "ip_adapter"])
def test_a_condition_from_the_cpu(method: str) -> None:
    images = []
    for device in ("cpu", DEVICE):
        pipe = tiny_pipeline("sd")
        torch.manual_seed(0)
        control: Any = attach(pipe, method)
        perturb(control)
        pipe.to(device)
        condition = {"embeds": torch.ones(1, 1, control.method.width)} if method == "ip_adapter" else {"image": picture()}
        with control.condition(**condition):
            latents = pipe(
                "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
            ).images
        images.append(latents.cpu())
    torch.testing.assert_close(images[1], images[0], rtol=1e-3, atol=1e-3)


def picture() -> Image.Image:
    return Image.linear_gradient("L").resize((32, 32)).convert("RGB")


def test_a_classifier_trains_on_the_device(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for i in range(20):
        image = picture().rotate(90 * (i % 2)).point([(value + i) % 256 for value in range(256)] * 3)
        file = photos / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    accuracies = []
    for device in ("cpu", DEVICE):
        out = tmp_path / device[:3]
        settings: dict[str, Any] = {"method": "vpt", "epochs": 1, "batch": 4, "validation": 0.2, "optimizer": "sgd"}
        config = TransferConfig(data=str(photos), out=out, learning_rate=0.1, **settings)
        with accelerator_on(device) as accelerator:
            transfer(config, accelerator)
        result = json.loads((out / "result.json").read_text())
        accuracies.append(result["test"]["accuracy"])
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.02)


def test_a_tensor_left_on_the_cpu_is_found() -> None:
    model, _ = net(2)
    model.to(DEVICE)
    with pytest.raises(DeviceMismatch):
        output(model, inputs(2))
