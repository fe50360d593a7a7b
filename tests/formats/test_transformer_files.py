"""LoRA of diffusion transformers as other tools write it: read, written back, and with the outputs of diffusers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats import lycoris_cases
from tests.formats.cases import deltas, fill
from tests.formats.low_rank import assert_same
from tests.formats.transformer_peers import PEERS, Peer, load_in_diffusers, output, tiny
from tests.raising import raises
from veneer.formats import format_of, formats, read
from veneer.injection import LoadError, SaveError, attach


@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_files_of_other_tools(peer: Peer, tmp_path: Path) -> None:
    """Every ΔW, no unused key; written back, the same tensors where the format writes these names, else the same ΔW."""
    model = tiny(peer.family)
    state, want = peer.file(model)
    save_file(state, tmp_path / "a.safetensors")
    assert format_of(read(tmp_path / "a")).name == peer.form
    attached = veneer.load(model, tmp_path / "a")
    assert attached.loaded.clean
    assert_same(deltas(attached), want)
    path = formats.get(peer.round_trip or peer.form)().save(attached, tmp_path / "b")
    if peer.is_written:
        again = load_file(path)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
    else:
        attached.detach()
        assert_same(deltas(veneer.load(model, path)), want)


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters:RuntimeWarning")
@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.mixin], ids=str)
def test_outputs_are_those_of_diffusers(peer: Peer, tmp_path: Path) -> None:
    model, theirs = tiny(peer.family), tiny(peer.family)
    base = output(model)
    save_file(peer.file(model)[0], tmp_path / "a.safetensors")
    load_in_diffusers(theirs, peer.family, peer.mixin, tmp_path / "a.safetensors")
    veneer.load(model, tmp_path / "a")
    ours = output(model)
    assert (ours - base).abs().max() > 1e-2
    torch.testing.assert_close(ours, output(theirs), rtol=1e-4, atol=1e-5)


NEW_TO_DIFFUSERS = [peer for peer in PEERS if not peer.mixin and peer.family in ("sd35_medium", "sd35_large", "sana", "krea2")]


@pytest.mark.parametrize("peer", NEW_TO_DIFFUSERS, ids=str)
def test_files_that_diffusers_does_not_read_are_converted_for_it(peer: Peer, tmp_path: Path) -> None:
    model, theirs = tiny(peer.family), tiny(peer.family)
    base = output(model)
    save_file(peer.file(model)[0], tmp_path / "a.safetensors")
    path = formats.get("diffusers")().save(veneer.load(model, tmp_path / "a"), tmp_path / "b")
    theirs.load_lora_adapter(load_file(path), prefix="transformer", metadata=read(path).json("lora_adapter_metadata"))
    assert (output(model) - base).abs().max() > 1e-2
    torch.testing.assert_close(output(model), output(theirs), rtol=1e-4, atol=1e-5)


WRITTEN = [
    ("z_image", "kohya", "ZImageLoraLoaderMixin"), ("z_image", "diffusers", "ZImageLoraLoaderMixin"),
    ("flux2", "kohya", "Flux2LoraLoaderMixin"), ("flux2", "diffusers", "Flux2LoraLoaderMixin"),
    ("chroma", "kohya", "FluxLoraLoaderMixin"), ("chroma", "diffusers", "FluxLoraLoaderMixin"),
    ("qwen_image", "kohya", "QwenImageLoraLoaderMixin"), ("qwen_image", "comfyui", "QwenImageLoraLoaderMixin"),
    ("qwen_image", "diffusers", "QwenImageLoraLoaderMixin"), ("lumina2", "diffusers", "Lumina2LoraLoaderMixin"),
    ("wan", "comfyui", "WanLoraLoaderMixin"), ("hunyuan_video", "diffusers", "HunyuanVideoLoraLoaderMixin"),
    ("krea2", "diffusers", "Krea2LoraLoaderMixin"), ("sd35_medium", "diffusers", "SD3LoraLoaderMixin"),
    ("sd35_large", "diffusers", "SD3LoraLoaderMixin"), ("sana", "diffusers", "SanaLoraLoaderMixin"),
]  # fmt: skip
SINGLE = "single_transformer_blocks.{}.attn.to_qkv_mlp_proj"


@pytest.mark.parametrize(("family", "form", "mixin"), WRITTEN)
def test_diffusers_reads_what_is_written(family: str, form: str, mixin: str, tmp_path: Path) -> None:
    """With a rank and an alpha of their own for values and for the feed-forward's output."""
    model, theirs = tiny(family), tiny(family)
    whole = [f"name:{SINGLE.format(i)}" for i in range(2)] if family == "flux2" else []
    where = {
        "flux2": ["dit.double/attn", "dit.double/mlp", "single.out", *whole], "sana": ["attn", "xattn", "mlp.in", "mlp.out"],
    }.get(family, ["attn", "mlp"])  # fmt: skip
    by_site: dict[str, Any] = {"attn.v": {"rank": 5}, "mlp.out": {"alpha": 7.0}}
    lora = fill(attach(model, "lora", where=where, rank=3, alpha=2.0, by_site=by_site), std=0.2)
    path = formats.get(form)().save(lora, tmp_path / "a")
    load_in_diffusers(theirs, family, mixin, path)
    torch.testing.assert_close(output(model), output(theirs), rtol=1e-4, atol=1e-5)


QKV = {"attention.to_q": 16, "attention.to_k": 16, "attention.to_v": 16}
STREAM = {"attn.to_q": 16, "attn.to_k": 16, "attn.to_v": 16}
LAYERS, DOUBLE, SINGLE_0 = "layers.0", "transformer_blocks.0", {"attn.to_qkv_mlp_proj": 144}
METHODS = [
    # ai-toolkit `toolkit/network_mixins.py`
    ("z_image", "diffusion_model.layers.0.attention.to_q", "lokr", LAYERS, {"attention.to_q": 16}),
    ("flux2", "diffusion_model.double_blocks.0.img_attn.qkv", "lokr", DOUBLE, STREAM),
    # SimpleTuner with LyCORIS
    ("flux2", "lycoris_single_transformer_blocks_0_attn_to_qkv_mlp_proj", "lokr", "single_transformer_blocks.0", SINGLE_0),
    ("qwen_image", "lycoris_transformer_blocks_0_attn_to_k", "lokr", DOUBLE, {"attn.to_k": 16}),
    ("qwen_image", "transformer_blocks.0.attn.to_q", "lokr", DOUBLE, {"attn.to_q": 16}),
    ("krea2", "diffusion_model.blocks.0.attn.wq", "lokr", DOUBLE, {"attn.to_q": 24}),
    # musubi-tuner `networks/loha.py`, and converted for ComfyUI
    ("z_image", "lora_unet_layers_0_attention_to_v", "loha", LAYERS, {"attention.to_v": 16}),
    ("z_image", "lora_unet_layers_0_attention_qkv", "loha", LAYERS, QKV),
    ("chroma", "lora_unet_single_blocks_1_linear1", "loha", "single_transformer_blocks.1", STREAM | {"proj_mlp": 64}),
    # ComfyUI `comfy/weight_adapter`
    ("z_image", "diffusion_model.layers.0.attention.qkv", "dora", LAYERS, QKV),
    ("lumina2", "lora_unet_layers_0_attention_qkv", "dora", LAYERS, {"attn.to_q": 36, "attn.to_k": 12, "attn.to_v": 12}),
]


@pytest.mark.parametrize(("family", "name", "method", "block", "rows"), METHODS)
def test_other_methods_of_other_tools(
    family: str, name: str, method: str, block: str, rows: dict[str, int], tmp_path: Path
) -> None:
    """By the equations of the papers, with alpha / rank; written in LyCORIS' format and read again."""
    model, generator = tiny(family), torch.Generator().manual_seed(0)
    height, width = sum(rows.values()), model.get_submodule(f"{block}.{next(iter(rows))}").weight.shape[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = torch.cat([model.get_submodule(f"{block}.{path}").weight.detach().double() for path in rows])
    if method == "lokr":
        parts = {"lokr_w1": normal(4, 4), "lokr_w2_a": normal(height // 4, 2), "lokr_w2_b": normal(2, width // 4)}
        want = torch.kron(parts["lokr_w1"].double(), parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()) * 1.5
    elif method == "loha":
        parts = {f"hada_w{i}_a": normal(height, 2) for i in (1, 2)} | {f"hada_w{i}_b": normal(2, width) for i in (1, 2)}
        first, second = (parts[f"hada_w{i}_a"].double() @ parts[f"hada_w{i}_b"].double() for i in (1, 2))
        want = first * second * 1.5
    else:
        parts = {"lora_down.weight": normal(2, width), "lora_up.weight": normal(height, 2)}
        parts["dora_scale"] = normal(height, 1).abs() + 0.5
        whole = weight + parts["lora_up.weight"].double() @ parts["lora_down.weight"].double() * 1.5
        want = parts["dora_scale"].double() * whole / whole.norm(dim=1, keepdim=True) - weight
    save_file({f"{name}.{end}": t for end, t in parts.items()} | {f"{name}.alpha": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    by_site = dict(zip([f"{block}.{path}" for path in rows], want.split([*rows.values()]), strict=True))
    loaded = veneer.load_all(model, tmp_path / "a")
    assert [attached.method.name for attached in loaded] == [method]
    lycoris_cases.assert_same(lycoris_cases.changes(loaded), by_site)
    path = formats.get("lycoris")().save(loaded, tmp_path / "b")
    lycoris_cases.assert_same(lycoris_cases.changes(veneer.load_all(tiny(family), path)), by_site)


@pytest.mark.parametrize("form", ["comfyui", "kohya", "diffusers", "onetrainer"])
def test_slices_of_a_fused_projection_are_written_as_the_whole(form: str, tmp_path: Path) -> None:
    """FLUX.2: rows of `to_qkv_mlp_proj` without an adapter are zero."""
    model, name = tiny("flux2"), "single_transformer_blocks.1.attn."
    lora = fill(attach(model, "lora", where=[f"name:{name}to_q", f"name:{name}up"], rank=3), std=0.2)
    want, zero = deltas(lora), torch.zeros(16, 16).double()
    path = formats.get(form)().save(lora, tmp_path / "a")
    lora.detach()
    whole = [want[f"{name}to_q"], zero, zero, torch.zeros(48, 16).double(), want[f"{name}up"]]
    assert_same(deltas(veneer.load(model, path)), {f"{name}to_qkv_mlp_proj": torch.cat(whole)})


def test_slices_of_a_pipeline_and_of_its_bare_transformer_are_written_alike(tmp_path: Path) -> None:
    model, where = tiny("flux2"), "name:*single_transformer_blocks.1.attn.to_q"
    whole = attach(SimpleNamespace(components={"transformer": model}), "lora", where=where, rank=3)
    paths = [formats.get("diffusers")().save(fill(whole, std=0.2), tmp_path / "a")]
    whole.detach()
    bare = attach(model, "lora", where=where, rank=3)
    paths.append(formats.get("diffusers")().save(fill(bare, std=0.2), tmp_path / "b"))
    first, second = map(load_file, paths)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], tensor) for key, tensor in second.items())


def test_dora_of_slices_has_no_place_in_files_of_diffusers(tmp_path: Path) -> None:
    name = "single_transformer_blocks.1.attn.to_q"
    dora = attach(tiny("flux2"), "dora", where=f"name:{name}", rank=3)
    with raises(SaveError, where=name, given="slice"):
        formats.get("diffusers")().save(dora, tmp_path / "a")


def test_a_file_of_another_family_is_rejected(tmp_path: Path) -> None:
    """At the published width, which identifies the family, and with the keys of two families in one file."""
    name = "diffusion_model.layers.0.attention.qkv"
    state = {f"{name}.lora_A.weight": torch.ones(1, 3840), f"{name}.lora_B.weight": torch.ones(11520, 1)}
    save_file(state, tmp_path / "a.safetensors")
    with raises(LoadError, unused=tuple(state), family="Z-Image"):
        veneer.load(tiny("flux2"), tmp_path / "a")
    (peer,) = [peer for peer in PEERS if str(peer) == "flux2 ai-toolkit"]
    model = tiny("flux2")
    save_file(state | peer.file(model)[0], tmp_path / "b.safetensors")
    with raises(LoadError, unused=tuple(state)):
        veneer.load(model, tmp_path / "b")
    assert veneer.attachments(model) == []
