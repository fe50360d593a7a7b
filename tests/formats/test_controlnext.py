"""ControlNeXt: the tensors that the authors' code saves, by name and shape, and their meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.formats.cases import rewrite
from tests.formats.guides import form, guided, output, paper, picture, real, tiny, trained
from tests.raising import raises
from veneer.formats import Options, controlnext, convert, inspect, read
from veneer.injection import LoadError


def sizes(width: int) -> dict[str, tuple[int, ...]]:
    """Of the authors' class for a UNet whose first features are so wide, written out layer by layer."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, kernel: int = 3) -> None:
        found.update({f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)})

    def flat(name: str, *shape: int) -> None:
        found.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    flat("time_embedding.linear_1", 256, 128)
    flat("time_embedding.linear_2", 256, 256)
    for i, (into, out) in enumerate([(3, 64), (64, 64), (64, 128)]):
        conv(f"embedding.{3 * i}", out, into)
        flat(f"embedding.{3 * i + 1}", out)
    for i, (into, out) in enumerate([(128, 128), (128, 256)]):
        flat(f"down_res.{i}.norm1", into)
        conv(f"down_res.{i}.conv1", out, into)
        flat(f"down_res.{i}.time_emb_proj", out, 256)
        flat(f"down_res.{i}.norm2", out)
        conv(f"down_res.{i}.conv2", out, out)
        if into != out:
            conv(f"down_res.{i}.conv_shortcut", out, into, 1)
        conv(f"down_sample.{i}.conv", out, out)
    for i in (0, 3):
        conv(f"mid_convs.0.{i}", 256, 256)
    for i in (2, 4):
        flat(f"mid_convs.0.{i}", 256)
    conv("mid_convs.1", width, 256, 1)
    return found


def state(width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in sizes(width).items()}


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_names_and_shapes_at_real_widths(model: str) -> None:
    attachment = veneer.attach(real(model), "controlnext", place="stem" if model == "sdxl" else "block")
    ((_, adapter),) = attachment.parts.values()
    assert {name: tuple(t.shape) for name, t in adapter.state_dict().items()} == sizes(320)


@pytest.mark.parametrize(("model", "place"), [("sd1", "block"), ("sdxl", "stem")])
def test_a_file_round_trip(model: str, place: str, tmp_path: Path) -> None:
    unet, flat = tiny(model), state(8)
    save_file({name: t.half() for name, t in flat.items()}, tmp_path / "x.safetensors")
    attachment = veneer.load(unet, tmp_path / "x")
    assert attachment.loaded.clean
    assert (attachment.method.place, attachment.method.channels) == (place, 3)
    changed = guided(unet, attachment, image=picture())
    assert (changed - output(tiny(model))).abs().max() > 1e-3
    after = load_file(controlnext.save(attachment, tmp_path / "y"))
    assert after.keys() == flat.keys()
    assert all(torch.equal(after[name], t.half().float()) for name, t in flat.items())


@pytest.mark.parametrize(("model", "place"), [("sd1", "block"), ("sd1", "stem"), ("sdxl", "block"), ("sdxl", "stem")])
def test_ours_means_the_same_when_it_is_loaded(model: str, place: str, tmp_path: Path) -> None:
    first, second = tiny(model), tiny(model)
    ours = trained(veneer.attach(first, "controlnext", channels=1, place=place))
    controlnext.save(ours, tmp_path / "x")
    again = veneer.load(second, tmp_path / "x")
    assert again.method.place == place
    both = [guided(unet, a, image=picture(1)) for unet, a in ((first, ours), (second, again))]
    assert torch.equal(*both)
    assert ("place" in read(tmp_path / "x").metadata) == ((model, place) in (("sd1", "stem"), ("sdxl", "block")))


def test_missing_unused_and_misshapen(tmp_path: Path) -> None:
    flat = state(12)
    del flat["embedding.4.bias"]
    save_file({**flat, "elsewhere": torch.ones(2)}, tmp_path / "x.safetensors")
    unet = tiny("sd1")
    with raises(LoadError, missing=("embedding.4.bias",), unused=("elsewhere",)) as caught:
        veneer.load(unet, tmp_path / "x")
    assert len(caught.value.misshapen) == 2
    assert caught.value.misshapen["mid_convs.1.weight"] == ((12, 256, 1, 1), (8, 256, 1, 1))
    assert veneer.attachments(unet) == []
    report = veneer.load(unet, tmp_path / "x", strict=False).loaded
    assert (report.missing, report.unused) == (("residuals:embedding.4.bias",), ("elsewhere",))


@pytest.mark.parametrize(
    ("without", "more", "data"),
    [
        ("embedding.", {"scale": (), "down_res.2.norm1.weight": (256,)}, {"missing": ("embedding.0.weight",)}),
        ("none", {"embedding.0.weight": (64, 3)}, {"where": "embedding.0.weight", "given": (64, 3), "expected": 4}),
        ("none", {"embedding.0.weight": (64, 0, 3, 3)}, {"option": "channels", "given": 0}),
        (
            "none",
            {"embedding.0.weight": (0, 10**6, 3, 3)},
            {"misshapen": {"embedding.0.weight": ((0, 10**6, 3, 3), (64, 10**6, 3, 3))}},
        ),
    ],
)
def test_what_is_rejected(without: str, more: dict[str, Any], data: dict[str, Any]) -> None:
    file = paper({**{name: s for name, s in sizes(8).items() if not name.startswith(without)}, **more})
    assert form(file) == "controlnext"
    with raises(LoadError, **data):
        controlnext.ControlNeXt().load(tiny("sd1"), file, Options())


def test_another_place_in_the_header(tmp_path: Path) -> None:
    save_file(state(8), tmp_path / "x.safetensors", {"place": "roof"})
    with raises(LoadError, where="place", given="roof", expected=("block", "stem")):
        veneer.load(tiny("sd1"), tmp_path / "x")


def test_a_stem_of_revision_1_is_rejected(tmp_path: Path) -> None:
    """It changed the first skip feature as well. `block` is unchanged, bitwise."""
    unet = tiny("sd1")
    for place, meta in (("stem", {"place": "stem"}), ("block", {"place": "block"})):
        save_file(state(8), tmp_path / f"{place}.safetensors", meta)
        attachment = trained(veneer.attach(tiny("sd1"), "controlnext", place=place))
        saved = attachment.save(tmp_path / f"native-{place}")
        rewrite(saved, first_revision, saved)
    for name in ("stem", "native-stem"):
        with raises(LoadError, where="controlnext", option="place", given=1, expected=2):
            veneer.load(unet, tmp_path / name)
        assert veneer.attachments(unet) == []
    assert veneer.load(unet, tmp_path / "block").method.place == "block"
    loaded = veneer.load(tiny("sd1"), tmp_path / "native-block")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), attachment.state_dict().values(), strict=True))


@pytest.mark.parametrize("revision", ["0", "x", "3"])
def test_an_unknown_revision_in_the_header(revision: str, tmp_path: Path) -> None:
    save_file(state(8), tmp_path / "x.safetensors", {"place": "stem", "revision": revision})
    data = {"where": "controlnext", "given": 3} if revision == "3" else {"where": "revision", "given": revision}
    with raises(LoadError, **data):
        veneer.load(tiny("sd1"), tmp_path / "x")


def first_revision(header: dict[str, Any]) -> None:
    """Written as before methods had revisions."""
    own = json.loads(header["__metadata__"]["veneer"])
    for entry in own["attachments"]:
        assert entry.pop("revision") == 2
    header["__metadata__"]["veneer"] = json.dumps(own)


def test_inspection_and_conversion(tmp_path: Path) -> None:
    save_file(state(8), tmp_path / "x.safetensors")
    unet = tiny("sd1")
    found = inspect(tmp_path / "x", unet)
    assert (found.format, found.fits) == ("controlnext", True)
    assert [block.name for block in found.blocks] == ["down_res", "down_sample", "embedding", "mid_convs", "time_embedding"]
    convert(unet, tmp_path / "x", "native", tmp_path / "n.safetensors")
    convert(unet, tmp_path / "n.safetensors", "controlnext", tmp_path / "y.safetensors")
    assert read(tmp_path / "y").shapes == read(tmp_path / "x").shapes
