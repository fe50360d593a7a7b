"""The weights of the base beside a ControlNeXt: as the authors' scripts load them into a UNet, in a round trip, and detached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats.guides import guided, picture, tiny, trained
from tests.formats.test_controlnext import state
from tests.raising import raises
from veneer.formats import controlnext, convert, inspect, native, read
from veneer.formats._names.modules import original_names
from veneer.injection import Attachment, LoadError, SaveError
from veneer.testing.pipelines import tiny_pipeline

WHOLE, ADDED = "unet.safetensors", "unet_weight_increasements.safetensors"
OUT = ("attn.out", "xattn.out")


def copied(unet: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def increments(unet: Any, part: str = "to_out", size: float = 0.01) -> dict[str, Tensor]:
    """Of the weights that have `part` in their name."""
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(t.shape, generator=generator) * size for n, t in unet.state_dict().items() if part in n}


def folder(path: Path, beside: dict[str, Tensor], name: str = WHOLE, file: str = "controlnet.safetensors") -> Path:
    """A network and, under `name`, weights of the base."""
    path.mkdir(exist_ok=True)
    save_file({key: t.contiguous() for key, t in beside.items()}, path / name)
    save_file(state(8), path / file)
    return path / file


def by_hand(model: str, path: Path, beside: dict[str, Tensor], added: bool) -> Tensor:
    """Output of a UNet whose state dict was changed as the authors' loaders do, with the network alone."""
    unet = tiny(model)
    own = unet.state_dict()
    values = {key: tensor + own[key] for key, tensor in beside.items()} if added else beside
    assert not unet.load_state_dict(values, strict=False).unexpected_keys
    path.mkdir()
    save_file(state(8), path / "x.safetensors")
    return guided(unet, veneer.load(unet, path / "x"), image=picture())


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
@pytest.mark.parametrize("name", [WHOLE, ADDED])
@pytest.mark.parametrize("added", [True, False])
def test_either_kind_under_either_name(model: str, name: str, added: bool, tmp_path: Path) -> None:
    unet = tiny(model)
    before, beside = copied(unet), increments(unet)
    if not added:
        beside = {key: before[key] + tensor for key, tensor in beside.items()}
    attachment = veneer.load(unet, folder(tmp_path / "a", beside, name))
    assert attachment.loaded.clean
    how = "added to the base weights" if added else "replacing base weights"
    assert attachment.loaded.notes == (f"{name} beside it: {len(beside)} tensors, {how}",)
    assert {path for _, path in attachment.extras.values()} == set(beside)
    assert attachment.extras == veneer.attach(tiny(model), "controlnext", train=OUT).extras
    assert torch.equal(guided(unet, attachment, image=picture()), by_hand(model, tmp_path / "b", beside, added))
    attachment.detach()
    assert list(unet.state_dict()) == list(before)
    assert all(torch.equal(t, before[key]) for key, t in unet.state_dict().items())


def test_original_names(tmp_path: Path) -> None:
    unet = tiny("sdxl")
    beside = increments(unet, "up_blocks.1.")
    renamed = dict(zip(original_names(unet, beside).values(), beside.values(), strict=True))
    assert all(key.startswith("output_blocks.") for key in renamed)
    attachment = veneer.load(unet, folder(tmp_path / "a", renamed))
    assert {path for _, path in attachment.extras.values()} == set(beside)
    assert torch.equal(guided(unet, attachment, image=picture()), by_hand("sdxl", tmp_path / "b", beside, True))
    twice = {**renamed, next(iter(beside)): next(iter(beside.values())).clone()}
    with raises(LoadError, unused=(next(iter(renamed)),)):
        veneer.load(tiny("sdxl"), folder(tmp_path / "a", twice))


def test_of_a_whole_unet_what_differs(tmp_path: Path) -> None:
    unet = tiny("sd1")
    beside = copied(unet)
    beside["conv_out.bias"] += 1
    beside["mid_block.attentions.0.norm.weight"] += 1
    beside["down_blocks.0.attentions.0.proj_in.weight"] += 1
    attachment = veneer.load(unet, folder(tmp_path, beside))
    assert attachment.loaded.notes == (f"{WHOLE} beside it: 3 tensors, replacing base weights",)
    assert {path for _, path in attachment.extras.values()} == {
        "conv_out.bias",
        "mid_block.attentions.0.norm.weight",
        *(f"down_blocks.0.attentions.0.proj_in.{p}" for p in ("weight", "bias")),  # which comes with its weight
    }
    assert all(torch.equal(t, beside[key]) for key, t in unet.state_dict().items())
    attachment.detach()
    assert veneer.load(unet, folder(tmp_path, copied(unet))).extras == {}


def ours(unet: Any, **options: Any) -> Any:
    return trained(veneer.attach(unet, "controlnext", **options))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_ours_round_trip_bitwise(kind: torch.dtype, tmp_path: Path) -> None:
    first, second, theirs = (tiny("sd1").to(kind) for _ in range(3))
    attachment = ours(first, train=(*OUT, "conv"))
    assert controlnext.save(attachment, tmp_path / "x") == tmp_path / "x.safetensors"
    again = veneer.load(second, tmp_path / "x")
    assert again.loaded.clean
    here, there = attachment.state_dict(), again.state_dict()
    assert here.keys() == there.keys()
    assert all(t.dtype == there[key].dtype and torch.equal(t, there[key]) for key, t in here.items())
    loaded = theirs.load_state_dict(load_file(tmp_path / WHOLE), strict=False)  # as the authors' scripts
    assert not loaded.unexpected_keys
    assert all(torch.equal(t, first.state_dict()[key]) for key, t in theirs.state_dict().items())
    pipe = tiny_pipeline("sd")
    attachment = ours(pipe, train=OUT)
    controlnext.save(attachment, tmp_path / "pipe" / "x")
    assert (
        set(read(tmp_path / "pipe" / WHOLE).shapes) == {path for _, path in attachment.extras.values()} <= set(copied(pipe.unet))
    )
    assert veneer.load(tiny_pipeline("sd"), tmp_path / "pipe" / "x").extras == attachment.extras


def test_untrained_weights_of_ours_stay_to_be_trained(tmp_path: Path) -> None:
    fresh: Any = veneer.attach(tiny("sd1"), "controlnext", train=OUT)
    assert veneer.load(tiny("sd1"), controlnext.save(fresh, tmp_path)).extras == fresh.extras


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_increments_on_half_precision_are_rounded_once(kind: torch.dtype, tmp_path: Path) -> None:
    unet = tiny("sd1").to(kind)
    before, beside = copied(unet), increments(unet)
    attachment = veneer.load(unet, folder(tmp_path, beside, ADDED))
    for key, tensor in beside.items():
        assert unet.state_dict()[key].dtype == kind
        assert torch.equal(unet.state_dict()[key], (before[key].double() + tensor.double()).to(kind))
    attachment.detach()
    assert all(torch.equal(t, before[key]) for key, t in unet.state_dict().items())


def test_incompatible_files_are_rejected(tmp_path: Path) -> None:
    unet = tiny("sd1")
    before, beside = copied(unet), increments(unet)
    key = next(iter(beside))
    path = folder(tmp_path, {**beside, "elsewhere": torch.ones(2), key: torch.ones(3, 3)}, ADDED)
    with raises(LoadError, file=str(path.with_name(ADDED)), unused=("elsewhere",), misshapen={key: ((3, 3), (8, 8))}):
        veneer.load(unet, path)
    assert veneer.attachments(unet) == []
    report = inspect(path, unet)
    assert (report.fits, report.unused) == (False, ("elsewhere",))
    attachment = veneer.load(unet, path, strict=False)
    assert attachment.loaded.misshapen == (f"{key.removesuffix('.weight')}:weight (3, 3) for (8, 8)",)
    assert torch.equal(unet.state_dict()[key], before[key])
    last = list(beside)[-1]
    assert torch.equal(unet.state_dict()[last], before[last] + beside[last])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def pickle(path: Path) -> None:
    torch.save({"x": torch.ones(1)}, path)


def infinite(path: Path) -> None:
    save_file({"conv_out.bias": torch.full((4,), torch.inf)}, path)


def too_large(path: Path) -> None:
    save_file({"conv_out.bias": torch.full((4,), 1e6)}, path)


def second(path: Path) -> None:
    save_file({"conv_out.bias": torch.ones(4)}, path.with_name(ADDED))


@pytest.mark.parametrize(
    ("harm", "data"),
    [
        (cut, {"where": "tensors"}),
        (pickle, {"given": "zip", "expected": "safetensors"}),
        (infinite, {"expected": "finite"}),
        (too_large, {"where": "conv_out.bias", "expected": torch.float16}),
        (second, {"given": (WHOLE, ADDED), "expected": 1}),
    ],
)
def test_a_damaged_file_beside(harm: Any, data: dict[str, Any], tmp_path: Path) -> None:
    unet = tiny("sd1").half()
    path = folder(tmp_path, increments(unet))
    before = copied(unet)
    harm(tmp_path / WHOLE)
    with raises(LoadError, **data):
        veneer.load(unet, path)
    assert veneer.attachments(unet) == []
    assert all(torch.equal(t, before[key]) for key, t in unet.state_dict().items())


def test_a_base_that_is_not_its_own(tmp_path: Path) -> None:
    unet = tiny("sd1")
    path = folder(tmp_path, increments(unet), ADDED)
    first = veneer.load(unet, path)
    held = {key: t.clone() for key, t in first.state_dict().items()}
    with raises(LoadError, given="controlnext") as caught:
        veneer.load(unet, path, name="more")
    assert caught.value.where in increments(tiny("sd1"))
    assert all(torch.equal(t, held[key]) for key, t in first.state_dict().items())
    trained(first)
    few = folder(tmp_path / "few", {key: t for key, t in increments(unet).items() if key.endswith("weight")}, ADDED)
    first.swap(few)  # on the base as it was, not as it is
    biases = {key: t for key, t in unet.state_dict().items() if "to_out" in key and key.endswith("bias")}
    assert all(torch.equal(t, tiny("sd1").state_dict()[key]) for key, t in biases.items())
    first.swap(path)
    assert all(torch.equal(t, held[key]) for key, t in first.state_dict().items())
    first.detach()
    trained(veneer.attach(unet, "lora", name="m")).merge()
    with raises(LoadError, where="m", given="merged"):
        veneer.load(unet, path)
    with torch.device("meta"), raises(LoadError, given="quantized or on the meta device"):
        veneer.load(tiny("sd1"), path)


def test_a_pickle_beside_is_reported(tmp_path: Path) -> None:
    save_file(state(8), tmp_path / "x.safetensors")
    pickle(tmp_path / "unet.bin")
    assert veneer.load(tiny("sd1"), tmp_path / "x").loaded.notes == ("unet.bin beside it is a pickle and was not loaded",)


def test_a_stale_file_of_ours_goes_and_another_stays(tmp_path: Path) -> None:
    with_more, without = ours(tiny("sd1"), train=OUT), ours(tiny("sd1"))
    controlnext.save(with_more, tmp_path / "x")
    controlnext.save(without, tmp_path / "y")
    other: Attachment = veneer.load(tiny("sd1"), tmp_path / "y")
    assert other.extras == {}
    assert other.loaded is not None
    assert other.loaded.notes == (f"{WHOLE} beside it belongs to x.safetensors and was not loaded",)
    kept = (tmp_path / WHOLE).read_bytes()
    with raises(SaveError, file=str(tmp_path / WHOLE), given="x.safetensors", expected="y.safetensors"):
        controlnext.save(with_more, tmp_path / "y")
    assert (tmp_path / WHOLE).read_bytes() == kept
    controlnext.save(without, tmp_path / "x")
    assert {p.name for p in tmp_path.iterdir()} == {"x.safetensors", "y.safetensors"}
    path = folder(tmp_path / "theirs", increments(tiny("sd1")))
    for attachment in (with_more, without):
        with raises(SaveError, file=str(path.with_name(WHOLE)), given=None, expected=path.name):
            controlnext.save(attachment, path)
    with raises(SaveError, given=WHOLE):
        controlnext.save(with_more, tmp_path / WHOLE)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    unet = tiny("sd1")
    attachment = ours(unet, train=OUT)
    with torch.no_grad():
        next(attachment.trained.items())[1].fill_(torch.nan)
    with raises(SaveError, expected="finite"):
        controlnext.save(attachment, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    whole = ours(tiny("sd1"), train=OUT)
    kept = [controlnext.save(whole, tmp_path / "x"), tmp_path / WHOLE]
    data = [path.read_bytes() for path in kept]
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(1)
        next(whole.parameters()).fill_(torch.inf)
    with raises(SaveError, expected="finite"):
        controlnext.save(whole, tmp_path / "x")
    assert [path.read_bytes() for path in kept] == data, "neither of both"
    trained(veneer.attach(unet, "lora", name="m")).merge()
    with raises(SaveError, where="m", given="merged"):
        controlnext.save(attachment, tmp_path / "m" / "y")
    texts = ours(tiny_pipeline("sd"), train="text/attn.q")
    with raises(SaveError, where=texts.name, given=tuple(texts.extras), expected=()):
        controlnext.save(texts, tmp_path / "x")


def test_a_conversion_takes_both_files(tmp_path: Path) -> None:
    unet = tiny("sd1")
    before = copied(unet)
    path = folder(tmp_path / "a", {key: before[key] + t for key, t in increments(unet).items()})
    for file in path.parent.iterdir():
        save_file({key: t.half() for key, t in load_file(file).items()}, file)
    convert(unet, path, "native", tmp_path / "n.safetensors")
    made = convert(unet, tmp_path / "n.safetensors", "controlnext", tmp_path / "b" / "x.safetensors")
    assert [p.name for p in made.files] == ["x.safetensors", WHOLE]
    assert all(t.dtype == torch.float32 and torch.equal(t, before[key]) for key, t in unet.state_dict().items())
    ends = [veneer.load(tiny("sd1"), p).state_dict() for p in (path, made.files[0])]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(t, ends[1][key]) for key, t in ends[0].items())
    with raises(SaveError, file=str(tmp_path / "b" / WHOLE), given="exists"):
        convert(unet, tmp_path / "n.safetensors", "controlnext", tmp_path / "b" / "y.safetensors")
    assert native.Native.beside == ()
