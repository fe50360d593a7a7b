"""T2I-Adapters of diffusers' class and with the original names: equal outputs, and equal tensors when saved again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats.guides import assert_close, form, guided, output, paper, picture, real, tiny, trained
from tests.raising import raises
from veneer.formats import Options, convert, inspect, read, t2i_adapter
from veneer.injection import LoadError, SaveError
from veneer.injection.sites import ResidualSite

NAME = "diffusion_pytorch_model.safetensors"
TYPES = {"full_adapter": ("sd1", (8, 16, 16)), "light_adapter": ("sd1", (8, 16)), "full_adapter_xl": ("sdxl", (8, 16, 16, 16))}


def adapter(kind: str, **options: Any) -> Any:
    model, channels = TYPES[kind]
    shape = {"channels": channels, "num_res_blocks": 2, "downscale_factor": 8 if model == "sd1" else 16, "adapter_type": kind}
    return trained(T2IAdapter(**{**shape, **options}))


@torch.no_grad()
def by_diffusers(unet: Any, made: Any, image: Tensor) -> Tensor:
    return output(unet, down_intrablock_additional_residuals=list(made(image)))


def saved(made: Any, folder: Path) -> Path:
    made.save_pretrained(folder)
    return folder


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("kind", TYPES)
def test_a_folder_of_diffusers_round_trip(kind: str, tmp_path: Path) -> None:
    unet, made = tiny(TYPES[kind][0]), adapter(kind)
    attachment = veneer.load(unet, saved(made, tmp_path / "a"))
    assert attachment.loaded.clean
    changed = guided(unet, attachment, image=picture())
    assert (changed - output(tiny(TYPES[kind][0]))).abs().max() > 1e-3
    assert_close(changed, by_diffusers(tiny(TYPES[kind][0]), made, picture()))
    written = t2i_adapter.save(attachment, tmp_path / "b")
    assert written == tmp_path / "b" / NAME
    before, after = load_file(tmp_path / "a" / NAME), load_file(written)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert config(tmp_path / "b") == {k: v for k, v in config(tmp_path / "a").items() if k != "_name_or_path"}


@pytest.mark.parametrize("kind", ["full", "light"])
def test_ours_is_a_folder_for_diffusers(kind: str, tmp_path: Path) -> None:
    unet = tiny("sd1")
    attachment = trained(veneer.attach(unet, "t2i_adapter", kind=kind, channels=1))
    t2i_adapter.save(attachment, tmp_path / "a")
    read_: Any = T2IAdapter.from_pretrained(tmp_path / "a")
    found = by_diffusers(tiny("sd1"), read_, picture(1))
    assert_close(found, guided(unet, attachment, image=picture(1)))
    again = veneer.load(tiny("sd1"), tmp_path / "a").method
    assert (again.kind, again.channels, again.blocks) == (kind, 1, 0)


def by_the_authors(made: Any, kind: str, blocks: int) -> dict[str, Tensor]:
    """Tensors as in the authors' class: blocks numbered across all levels, or per level in its `body`."""
    found, net = {}, made.adapter
    if kind == "full_adapter":
        found = {f"conv_in.{n}": p for n, p in net.conv_in.named_parameters()}
    for i, level in enumerate(net.body):
        for j, block in enumerate(level.resnets):
            at = f"body.{i}.body.{j}." if kind == "light_adapter" else f"body.{i * blocks + j}."
            found |= {at + n: p for n, p in block.named_parameters()}
        first = f"body.{i}" if kind == "light_adapter" else f"body.{i * blocks}"
        for name in ("in_conv", "out_conv"):
            conv = getattr(level, name, None)
            found |= {f"{first}.{name}.{n}": p for n, p in conv.named_parameters()} if conv is not None else {}
    return {name: p.detach() for name, p in found.items()}


@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter"])
def test_original_names(kind: str, blocks: int, tmp_path: Path) -> None:
    made, unet = adapter(kind, num_res_blocks=blocks), tiny("sd1")
    save_file(by_the_authors(made, kind, blocks), tmp_path / "x.safetensors")
    attachment = veneer.load(unet, tmp_path / "x")
    assert attachment.loaded.clean
    assert len(load_file(tmp_path / "x.safetensors")) == len(made.state_dict())
    assert_close(guided(unet, attachment, image=picture()), by_diffusers(tiny("sd1"), made, picture()))


@pytest.mark.parametrize("prefix", ["adapter.", ""])
def test_one_file_without_a_config(prefix: str, tmp_path: Path) -> None:
    made, unet = adapter("full_adapter_xl").half(), tiny("sdxl")
    state = {prefix + key.removeprefix("adapter."): t for key, t in made.state_dict().items()}
    save_file(state, tmp_path / "x.safetensors")
    attachment = veneer.load(unet, tmp_path / "x")
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}
    found = guided(unet, attachment, image=picture())
    assert_close(found, by_diffusers(tiny("sdxl"), made.float(), picture()))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("sd1", {"adapter_type": "full_adapter"}),
        ("sd1", {"adapter_type": "light_adapter", "channels": [320, 640, 1280], "num_res_blocks": 4}),
        ("sdxl", {"adapter_type": "full_adapter_xl", "downscale_factor": 16}),
    ],
)
def test_names_and_shapes_at_real_widths(model: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        known: Any = T2IAdapter(**options)
    kind = options["adapter_type"].partition("_")[0]
    attachment = veneer.attach(real(model), "t2i_adapter", kind=kind)
    ((site, module),) = attachment.parts.values()
    assert isinstance(site, ResidualSite)
    assert t2i_adapter.type_of(site, kind) == options["adapter_type"]
    assert {f"adapter.{k}": t.shape for k, t in module.state_dict().items()} == {
        k: t.shape for k, t in known.state_dict().items()
    }


def test_another_family(tmp_path: Path) -> None:
    unet = tiny("sd1")
    with raises(LoadError, option="downscale_factor", given=16, expected=8):
        veneer.load(unet, saved(adapter("full_adapter_xl"), tmp_path / "a"))
    save_file(load_file(tmp_path / "a" / NAME), tmp_path / "x.safetensors")
    with raises(LoadError, given=768, expected=64):
        veneer.load(unet, tmp_path / "x")
    made = by_the_authors(adapter("full_adapter"), "full_adapter", 2)
    with raises(LoadError, given=192, expected=256):
        t2i_adapter.T2IAdapter().load(tiny("sdxl"), paper(made), Options())
    saved(adapter("full_adapter", downscale_factor=16), tmp_path / "b")
    with raises(LoadError, option="adapter_type", given="full_adapter", expected="full"):
        veneer.load(tiny("sdxl"), tmp_path / "b")
    assert veneer.attachments(unet) == []


@pytest.mark.parametrize("named", ["full", "a full_adapter", ["full_adapter"], "light_adapter", {"full_adapter": 1}])
def test_a_type_that_is_none_of_diffusers(named: Any, tmp_path: Path) -> None:
    path = saved(adapter("full_adapter"), tmp_path / "a") / "config.json"
    path.write_text(json.dumps({**config(tmp_path / "a"), "adapter_type": named}))
    with raises(LoadError, file=str(path), option="adapter_type", given=named, expected="full"):
        veneer.load(tiny("sd1"), tmp_path / "a")


def test_missing_unused_and_misshapen(tmp_path: Path) -> None:
    state = by_the_authors(adapter("full_adapter"), "full_adapter", 2)
    del state["body.3.block2.bias"]
    save_file({**state, "elsewhere": torch.ones(2), "conv_in.bias": torch.ones(3)}, tmp_path / "x.safetensors")
    unet = tiny("sd1")
    with raises(LoadError, missing=("body.3.block2.bias",), unused=("elsewhere",), misshapen={"conv_in.bias": ((3,), (8,))}):
        veneer.load(unet, tmp_path / "x")
    report = veneer.load(unet, tmp_path / "x", strict=False).loaded
    assert report.missing == ("residuals:body.1.resnets.1.block2.bias",)
    assert report.unused == ("elsewhere",)


def test_the_first_design_and_too_many_blocks() -> None:
    blocks = {f"body.{i}.block1.weight": (8, 8, 3, 3) for i in range(6)}
    wrong: tuple[tuple[dict[str, tuple[int, ...]], dict[str, Any]], ...] = (
        ({"body.0.skep.weight": (8, 8, 3, 3)}, {"where": "body.0.skep.weight"}),
        ({"conv_in.weight": (8, 192)}, {"where": "conv_in.weight", "given": (8, 192), "expected": 4}),
        ({f"body.0.resnets.{i}.block1.weight": (1,) for i in range(65)}, {"given": 65, "expected": 64}),
    )
    for more, data in wrong:
        file = paper({**blocks, **more})
        assert form(file) == "t2i_adapter"
        with raises(LoadError, **data):
            t2i_adapter.T2IAdapter().load(tiny("sd1"), file, Options())


@pytest.mark.parametrize(
    ("model", "kind", "shape", "type_"),
    [
        ("sd1", "full", (8, 16, 24), "full_adapter"),
        ("sd1", "light", (8, 16, 24), None),
        ("sdxl", "full", (8, 16, 24), "full_adapter_xl"),
        ("sdxl", "light", (8, 16, 16), None),
    ],
)
def test_levels_of_none_of_the_types(model: str, kind: str, shape: tuple[int, ...], type_: str | None, tmp_path: Path) -> None:
    attachment = veneer.attach(tiny(model, block_out_channels=shape), "t2i_adapter", kind=kind)
    ((site, _),) = attachment.parts.values()
    assert isinstance(site, ResidualSite)
    assert t2i_adapter.type_of(site, kind) == type_
    if type_ is None:
        with raises(SaveError, given=tuple(site.inner_widths)):
            t2i_adapter.save(attachment, tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_inspection_and_conversion(tmp_path: Path) -> None:
    saved(adapter("full_adapter"), tmp_path / "a")
    unet = tiny("sd1")
    found = inspect(tmp_path / "a", unet)
    assert (found.format, found.family, found.fits) == ("t2i_adapter", "Stable Diffusion 1 or 2", True)
    assert [block.name for block in found.blocks] == ["body.0", "body.1", "body.2", "conv_in"]
    convert(unet, tmp_path / "a", "native", tmp_path / "n.safetensors")
    convert(unet, tmp_path / "n.safetensors", "t2i_adapter", tmp_path / "b")
    assert read(tmp_path / "b").shapes == read(tmp_path / "a").shapes
    assert veneer.attachments(unet) == []
