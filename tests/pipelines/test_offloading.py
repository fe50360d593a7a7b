"""`veneer generate --offload`: the images of a pipeline that is on the device as a whole, in less of its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from PIL import Image, ImageChops
from torch import Tensor, nn
from veneer.pipelines.generate import GenerateConfig, generate

import veneer
from tests.raising import raises
from veneer import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.testing.simulated_accelerator import DEVICE, simulated_accelerator


@pytest.fixture(scope="module", params=["sd", "sd3"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny base model and an adapter of it that changes images."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = tiny_pipeline(request.param)
    pipe.save_pretrained(folder / "base")
    (folder / "base" / "veneer.json").write_text('{"steps": 2}')
    attached = veneer.attach(pipe, "lora", rank=2)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return folder / "base", attached.save(folder / "adapter")


@pytest.fixture
def swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets diffusers move a group by swapping whole tensors, as it does for torchao: data of another class, such as a simulated
    tensor's, cannot be assigned."""

    def swap(tensor: Tensor, moved: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, moved)

    def onload(group: Any, tensor: Tensor, source: Tensor, _: Any) -> None:
        swap(tensor, source.detach().to(group.onload_device))

    def offload(group: Any) -> None:
        inside = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
        for tensor in (*inside, *group.parameters, *group.buffers):
            swap(tensor, tensor.detach().to(group.offload_device))

    monkeypatch.setattr(group_offloading.ModuleGroup, "_transfer_tensor_to_device", onload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "_offload_to_memory", offload)


def images(trained: tuple[Path, Path], out: Path, **settings: Any) -> tuple[Image.Image, int]:
    """An image, and the bytes that its generation had on the device at most."""
    base, adapter = trained
    config = GenerateConfig(("a cat",), (str(adapter),), base=str(base), dtype="float32", out=out, **settings)
    with simulated_accelerator() as accelerator:
        files = generate(config)
    return Image.open(files[0]).convert("RGB"), accelerator.peak_bytes


@pytest.mark.usefixtures("swaps")
def test_images_are_the_same_in_less_memory(trained: tuple[Path, Path], tmp_path: Path) -> None:
    expected, most = images(trained, tmp_path / "none", device=DEVICE)
    for kind in ("model", "group"):
        got, peak = images(trained, tmp_path / kind, device=DEVICE, offload=kind)
        assert ImageChops.difference(got, expected).getbbox() is None
        assert peak < most
        most = peak


def test_what_cannot_be_offloaded_is_an_error_before_loading(tmp_path: Path) -> None:
    with raises(OptionError, option="offload", given="model", expected=("none",)):
        generate(GenerateConfig(("a cat",), base="missing/model", device="cpu", offload="model", out=tmp_path))
    wrong: Any = "disk"
    with raises(OptionError, option="offload", given="disk", expected=("none", "model", "group")):
        generate(GenerateConfig(("a cat",), base="missing/model", device="cpu", offload=wrong, out=tmp_path))
    with simulated_accelerator(), raises(OptionError, option="offload", given="group", expected=("none", "model")):
        config = GenerateConfig(("a cat",), base="missing/model", device=DEVICE, offload="group", quantize=("nf4",), out=tmp_path)
        generate(config)
