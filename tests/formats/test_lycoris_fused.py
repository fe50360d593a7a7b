"""Fused projections of FLUX in LyCORIS' layout: split and merged where that is exact, else rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats.cases import fill
from tests.formats.lycoris_cases import assert_same, by_site, changes, chosen, layer, read
from tests.raising import raises
from veneer.formats import convert, load_all, lycoris
from veneer.injection import LoadError, SaveError, attach
from veneer.testing.pipelines import tiny_pipeline

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LAST = "lora_unet_final_layer_adaLN_modulation_1"
SINGLE = "transformer.single_transformer_blocks.0.attn.to_"
ATTN = "transformer.transformer_blocks.0.attn.to_"
SLICES = [f"name:{SINGLE}{x}" for x in "qkv"]


def saved(path: Path, name: str, **parts: Tensor) -> Path:
    save_file({f"{name}.{end.replace('__', '.')}": t.contiguous() for end, t in parts.items()}, path / "x.safetensors")
    return path / "x.safetensors"


def place_of(pipe: Any, site: str) -> Any:
    (place,) = chosen(pipe, [site])
    return place


@pytest.mark.parametrize(
    ("left", "right"), [((6, 4), (16, 8)), ((3, 4), (32, 8)), ((1, 4), (96, 8))], ids=["blocks", "block-a-slice", "one-block"]
)
def test_kronecker_products_whose_blocks_are_those_of_the_slices(tmp_path: Path, left: Any, right: Any) -> None:
    torch.manual_seed(0)
    c, d = torch.randn(left), torch.randn(right)
    path = saved(tmp_path, QKV, lokr_w1=c, lokr_w2=d, alpha=torch.tensor(7.0))
    pipe = tiny_pipeline("flux")
    loaded = load_all(pipe, path)
    want = by_site(place_of(pipe, f"{ATTN}q"), torch.kron(c, d).double())
    assert_same(changes(loaded), want)
    again = load_file(lycoris.save(loaded, tmp_path / "again"))
    torch.testing.assert_close(torch.kron(again[f"{QKV}.lokr_w1"], again[f"{QKV}.lokr_w2"]), torch.kron(c, d))


@pytest.mark.parametrize(
    "shapes",
    [
        {"lokr_w1": (2, 4), "lokr_w2": (48, 8)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (48, 2), "lokr_w2_b": (2, 16)},
        {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 4), "lokr_w2": (48, 8)},
        {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 2), "lokr_w2_a": (24, 1), "lokr_w2_b": (1, 16)},
        {"lokr_w1": (2, 4), "lokr_w2": (48, 8), "dora_scale": (96, 1)},
        {"lokr_w1": (2, 4), "lokr_w2": (48, 8), "dora_scale": (1, 32)},
    ],
    ids=lambda shapes: " ".join(shapes),
)
def test_kronecker_products_whose_blocks_are_not_those_of_the_slices(tmp_path: Path, shapes: dict[str, Any]) -> None:
    """Exact, as one matrix (of low rank where D is) of each slice, and written as one module again."""
    torch.manual_seed(0)
    parts = {end: torch.randn(shape).abs() + 0.5 if end == "dora_scale" else torch.randn(shape) for end, shape in shapes.items()}
    path = saved(tmp_path, QKV, **parts, alpha=torch.tensor(3.0))
    pipe = tiny_pipeline("flux")
    place = place_of(pipe, f"{ATTN}q")
    loaded = load_all(pipe, path)
    assert [a.method.name for a in loaded] == ["lokr"]
    assert {name for a in loaded for name in a.parts} == {f"{ATTN}{x}" for x in "qkv"}
    c = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    d = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    ranks = [len(parts[end]) for end in ("lokr_w1_b", "lokr_w2_b") if end in parts]
    want = torch.kron(c.double(), d.double()) * (3.0 / ranks[0] if ranks else 1.0)
    if "dora_scale" in parts:
        weight = layer(pipe, place).weight.double()
        after, dim = weight + want, 1 if len(parts["dora_scale"]) > 1 else 0
        want = parts["dora_scale"] * after / after.norm(dim=dim, keepdim=True) - weight
    assert_same(changes(loaded), by_site(place, want))
    again = lycoris.save(loaded, tmp_path / "again")
    assert {key.rpartition(".")[0] for key in load_file(again)} == {QKV}
    assert_same(changes(load_all(tiny_pipeline("flux"), again)), by_site(place, want))


@pytest.mark.parametrize("axis", [None, "output", "input"])
@pytest.mark.parametrize("options", [{}, {"factor": 4, "rank": 1, "alpha": 3.0}], ids=["default", "low rank"])
def test_slices_of_no_common_product_are_written_under_the_paths_of_diffusers(
    tmp_path: Path, options: dict[str, Any], axis: str | None
) -> None:
    """`transformer.{path}.lokr_w1`, as ai-toolkit writes it and ComfyUI reads it; W + s·(C ⊗ D) by each module's own tensors."""
    pipe = tiny_pipeline("flux")
    tuned = fill(attach(pipe, "lokr", where=["attn", "single.out", "adaln", "text/attn.q"], norm_axis=axis, **options), std=0.3)
    want, path = changes(tuned), lycoris.save(tuned, tmp_path / "x")
    state = load_file(path)
    assert {key.rpartition(".")[0].replace(".text_model.", ".") for key in state} == {
        name.replace(".text_model.", ".") for name in tuned.parts
    }
    assert all(key.startswith(("transformer.", "text_encoder.text_model.")) for key in state)
    loaded = load_all(tiny_pipeline("flux"), path)
    assert [a.method.name for a in loaded] == ["lokr"]
    assert_same(changes(loaded), want)
    name = "transformer.transformer_blocks.0.attn.to_q"
    if axis is None and not options:
        torch.testing.assert_close(torch.kron(state[f"{name}.lokr_w1"], state[f"{name}.lokr_w2"]).double(), want[name])
    tuned.save(tmp_path / "native")
    convert(tiny_pipeline("flux"), tmp_path / "native.safetensors", "lycoris", tmp_path / "converted")
    assert load_file(tmp_path / "converted.safetensors").keys() == state.keys()


def test_lora_beside_slices_of_no_common_product_is_read_back(tmp_path: Path) -> None:
    """Two kinds of module names in one file: `lora_unet_…` and `transformer.{path}`."""
    pipe = tiny_pipeline("flux")
    lokr = fill(attach(pipe, "lokr", where=["attn"], factor=4, rank=1), std=0.3)
    lora = fill(attach(pipe, "lora", where=["single.out"], rank=2), std=0.3)
    path = lycoris.save([lokr, lora], tmp_path / "x")
    assert {key.partition("_")[0].partition(".")[0] for key in load_file(path)} == {"lora", "transformer"}
    want = changes([lokr, lora])
    loaded = load_all(tiny_pipeline("flux"), path)
    assert {a.method.name for a in loaded} == {"lokr", "lora"}
    assert_same(changes(loaded), want)


def test_halves_that_are_swapped(tmp_path: Path) -> None:
    """FLUX's last norm: the rows of the file are shift and scale, diffusers' scale and shift."""
    torch.manual_seed(0)
    c, d = torch.randn(4, 4), torch.randn(16, 8)
    pipe = tiny_pipeline("flux")
    loaded = load_all(pipe, saved(tmp_path, LAST, lokr_w1=c, lokr_w2=d))
    whole = torch.kron(c, d).double()
    assert_same(changes(loaded), {"transformer.norm_out.linear": torch.cat([whole[32:], whole[:32]])})
    again = load_file(lycoris.save(loaded, tmp_path / "again"))
    torch.testing.assert_close(torch.kron(again[f"{LAST}.lokr_w1"], again[f"{LAST}.lokr_w2"]).double(), whole)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dora", {"rank": 2}),
        ("loha", {"rank": 2, "alpha": 3.0}),
        ("oft", {"side": "output", "block_size": 8}),
        ("boft", {"side": "output", "m": 2, "b": 8}),
        ("ia3", {}),
    ],
)
def test_slices_that_are_not_all_adapted(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    """The others do not change, neither here nor in LyCORIS."""
    attachment = fill(attach(tiny_pipeline("flux"), method, where=[SLICES[0], SLICES[2]], **options), std=0.2)
    want = changes(attachment)
    path = lycoris.save(attachment, tmp_path / "x")
    assert {key.partition(".")[0] for key in load_file(path)} == {"lora_unet_single_blocks_0_linear1"}
    loaded = load_all(tiny_pipeline("flux"), path)
    assert {name for a in loaded for name in a.parts} == want.keys()
    assert_same(changes(loaded), want)
    if method != "boft":  # LyCORIS builds another butterfly for these widths
        assert_same(read(tiny_pipeline("flux"), path), want)


def test_ranks_that_differ_by_slice(tmp_path: Path) -> None:
    own = {SLICES[1]: {"rank": 3, "alpha": 1.0}}
    loha = fill(attach(tiny_pipeline("flux"), "loha", where=SLICES, rank=2, by_site=own), std=0.2)
    path = lycoris.save(loha, tmp_path / "x")
    assert_same(read(tiny_pipeline("flux"), path), changes(loha))
    (loaded,) = load_all(tiny_pipeline("flux"), path)
    assert {name[-1]: a.up1.shape[1] for name, (_, a) in loaded.parts.items()} == {"q": 2, "k": 3, "v": 2}


@pytest.mark.parametrize("prefix", ["oft_unet_", "lora_unet_"])
def test_sd_scripts_own_oft_of_flux(tmp_path: Path, prefix: str) -> None:
    """Separate blocks for each slice, each limited to alpha times the slice's outputs; written out as in the trainer."""
    torch.manual_seed(0)
    blocks = {f"oft_blocks__{i}": torch.randn(4, 8, 8) * 0.1 for i in range(3)}
    name = QKV.replace("lora_unet_", prefix)
    pipe = tiny_pipeline("flux")
    loaded = load_all(pipe, saved(tmp_path, name, **blocks, alpha=torch.tensor(0.01)))
    weight = layer(pipe, place_of(pipe, f"{ATTN}q")).weight.detach().double()
    want = []
    for part, b in zip(weight.chunk(3), blocks.values(), strict=True):
        q = b.double() - b.double().mT
        q = q * min(1.0, 0.01 * 32 / float(q.norm()))
        eye = torch.eye(8, dtype=torch.float64)
        r = torch.stack([(eye + one) @ torch.linalg.inv(eye - one) for one in q])
        turned = [sum(r[k, n, m] * part[8 * k + n] for n in range(8)) for k in range(4) for m in range(8)]
        want.append(torch.stack(turned) - part)
    assert_same(changes(loaded), {f"{ATTN}{x}": change for x, change in zip("qkv", want, strict=True)})
    assert "shortened" in str(loaded[0].loaded)


# what is refused


@pytest.mark.parametrize(
    ("parts", "expected"), [({"oft_blocks": (2, 48, 48)}, ((0, 32),)), ({"oft_blocks": (2, 4, 24, 24)}, ((0, 32),))]
)
def test_what_cannot_be_split(tmp_path: Path, parts: dict[str, Any], expected: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    path = saved(tmp_path, QKV, **{end: torch.randn(shape) for end, shape in parts.items()})
    with raises(LoadError, where=QKV, given=48, expected=expected):
        load_all(tiny_pipeline("flux"), path)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("oft", {"side": "output", "by_site": {SLICES[0]: {"blocks": 2}}}, "blocks"),
        ("glora", {"product": "matrices"}, "A"),
        ("ia3", {"inputs": "*"}, "scales"),
    ],
)
def test_what_cannot_be_joined(tmp_path: Path, method: str, options: dict[str, Any], expected: str) -> None:
    attachment = fill(attach(tiny_pipeline("flux"), method, where=SLICES, **options))
    with raises(SaveError, given="lora_unet_single_blocks_0_linear1", expected=expected):
        lycoris.save(attachment, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
