"""Black Forest Labs' original names: their control LoRAs against diffusers' converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import lora_conversion_utils as converters
from safetensors.torch import save_file
from torch import Tensor

import veneer
from tests.formats.cases import deltas
from tests.raising import raises
from veneer.formats import bfl, format_of, inspect, read
from veneer.formats._names.modules import original_modules
from veneer.injection import LoadError, SaveError, attach
from veneer.injection.towers import towers_of
from veneer.testing.pipelines import tiny_pipeline

RANK = 2


def control(model: Any) -> dict[str, Tensor]:
    """A control LoRA for a FLUX: pairs and biases of every layer, norms of queries and keys; nothing zero."""
    (tower,) = towers_of(model)
    state = {}
    for module in original_modules(tower):
        rows = sum(site.d_out for site in module.sites)
        shapes = {"lora_A.weight": (RANK, module.sites[0].d_in), "lora_B.weight": (rows, RANK), "lora_B.bias": (rows,)}
        state |= {f"{module.path}.{end}": torch.randn(shape) for end, shape in shapes.items()}
    width = model.config.attention_head_dim
    blocks = [f"double_blocks.{i}.{stream}_attn" for i in range(model.config.num_layers) for stream in ("img", "txt")]
    blocks += [f"single_blocks.{i}" for i in range(model.config.num_single_layers)]
    return state | {f"{b}.norm.{half}_norm.scale": torch.rand(width) + 0.5 for b in blocks for half in ("query", "key")}


def small(**config: Any) -> Any:
    """FLUX.1's numbers of blocks, which the converter assumes, with small widths."""
    sizes = {
        "num_attention_heads": 1, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4), "joint_attention_dim": 12,
        "num_layers": 19, "num_single_layers": 38, "in_channels": 24, "pooled_projection_dim": 6, "guidance_embeds": True,
    }  # fmt: skip
    model: Any = FluxTransformer2DModel(**{**sizes, **config})
    return model.eval()


@pytest.fixture(scope="module")
def made() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = small()
    return model, control(model)


def theirs(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """diffusers' conversion. It splits `linear1` at FLUX.1's widths, so each row is repeated to these widths."""
    width = model.config.attention_head_dim
    wide = {k: t.repeat_interleave(3072 // width, 0) if ".linear1.lora_B" in k else t for k, t in state.items()}
    found = converters._convert_bfl_flux_control_lora_to_diffusers(dict(wide))
    narrow = {}
    for key, tensor in found.items():
        single = "single_transformer_blocks" in key and any(n in key for n in ("to_q", "to_k", "to_v", "proj_mlp"))
        narrow[key] = tensor[:: 3072 // width] if single and "lora_B" in key else tensor
    last = "transformer.norm_out.linear.lora_A.weight"  # it swaps the halves of the rank as well, of A but not of B
    narrow[last] = torch.cat(narrow[last].chunk(2)[::-1])
    return narrow


def test_a_control_lora_is_what_diffusers_makes_of_it(made: Any, tmp_path: Path) -> None:
    model, state = made
    save_file(state, tmp_path / "x.safetensors")
    assert format_of(read(tmp_path / "x")).name == "bfl"
    want = theirs(state, model)
    want = {key.removeprefix("transformer."): tensor for key, tensor in want.items()}
    before = {n: p.clone() for n, p in model.named_parameters()}
    lora, shift = veneer.load_all(model, tmp_path / "x")
    try:
        got = deltas(lora)
        assert {f"{name}.lora_B.weight" for name in got} == {k for k in want if k.endswith("lora_B.weight")}
        for name, delta in got.items():
            both = want[f"{name}.lora_B.weight"].double() @ want[f"{name}.lora_A.weight"].double()
            torch.testing.assert_close(delta, both, msg=name)
        biases = {name.removesuffix(".bias"): adapter.delta for name, (_, adapter) in shift.parts.items()}
        assert {f"{name}.lora_B.bias" for name in biases} == {k for k in want if k.endswith("lora_B.bias")}
        assert all(torch.equal(delta, want[f"{name}.lora_B.bias"]) for name, delta in biases.items())
        norms = {k: t for k, t in want.items() if "lora_" not in k}
        assert len(norms) == 19 * 4 + 38 * 2
        assert all(torch.equal(model.get_parameter(k), t) for k, t in norms.items())
    finally:
        shift.detach()
        lora.detach()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_one_for_a_control_image_needs_a_widened_base(made: Any, tmp_path: Path) -> None:
    _, state = made
    save_file({**state, "img_in.lora_A.weight": torch.ones(RANK, 48)}, tmp_path / "x.safetensors")
    with raises(LoadError, where="img_in", given=48, expected=24):
        veneer.load(made[0], tmp_path / "x")
    wide = small(in_channels=48, out_channels=24)
    assert len(veneer.load_all(wide, tmp_path / "x")) == 2


def test_without_biases_and_norms_it_is_a_lora(tmp_path: Path) -> None:
    pipe = tiny_pipeline("flux")
    state = {k: t for k, t in control(pipe.transformer).items() if k.endswith(".weight")}
    save_file(state, tmp_path / "x.safetensors")
    loaded = veneer.load(pipe, tmp_path / "x")
    name = "double_blocks.0.img_mlp.2"
    want = state[f"{name}.lora_B.weight"].double() @ state[f"{name}.lora_A.weight"].double()
    torch.testing.assert_close(deltas(loaded)["transformer.transformer_blocks.0.ff.net.2"], want)


def test_peft_puts_a_prefix_before_the_names(tmp_path: Path) -> None:
    """`base_model.model.double_blocks…`: in a single file ΔW = B A, in peft's folder scaled by the config's alpha."""
    pipe = tiny_pipeline("flux")
    state = control(pipe.transformer)
    save_file(state, tmp_path / "x.safetensors")
    save_file({f"base_model.model.{key}": tensor for key, tensor in state.items()}, tmp_path / "y.safetensors")
    assert format_of(read(tmp_path / "y")).name == "bfl"
    found = []
    for name in ("x", "y"):
        lora, shift = veneer.load_all(pipe, tmp_path / name)
        found.append((deltas(lora), {k: t.clone() for k, t in (lora.state_dict() | shift.state_dict()).items()}))
        shift.detach()
        lora.detach()
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(tensor, found[1][1][key]) for key, tensor in found[0][1].items())

    folder = tmp_path / "folder"
    folder.mkdir()
    pairs = {
        f"base_model.model.{key}": tensor for key, tensor in state.items() if key.endswith((".lora_A.weight", ".lora_B.weight"))
    }
    save_file(pairs, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3.0, "alpha_pattern": {"double_blocks.0.img_mlp.0": 1.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert format_of(read(folder)).name == "bfl"
    assert {alpha for block in inspect(folder).blocks for alpha in block.alphas} == {1.0, 3.0}
    got = deltas(veneer.load(pipe, folder))
    for name, want in found[0][0].items():
        alpha = 1.0 if name == "transformer.transformer_blocks.0.ff.net.0.proj" else 3.0
        torch.testing.assert_close(got[name], want * alpha / RANK, msg=name)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with raises(LoadError, given="DoRA", expected="LORA"):
        veneer.load(pipe, folder)


def test_layers_biases_and_norms_are_listed_as_such(tmp_path: Path) -> None:
    state = control(tiny_pipeline("flux").transformer)
    save_file(state, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x")
    methods = [layer.method for layer in bfl.BFL().layers(read(tmp_path / "x"))]
    counts = {end: sum(key.endswith(end) for key in state) for end in (".lora_A.weight", ".lora_B.bias", "_norm.scale")}
    assert [methods.count(method) for method in ("lora", "bitfit", "norm")] == list(counts.values())
    assert sum(block.values for block in found.blocks) == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize(
    ("key", "shape", "data"),
    [
        ("double_blocks.0.img_mlp.0.lora_B.bias", (3,), {"given": (3,), "expected": "bias"}),
        ("double_blocks.9.img_mlp.0.lora_B.bias", (3,), {"given": (3,), "expected": "bias"}),
        ("single_blocks.9.norm.query_norm.scale", (16,), {"unused": ("single_blocks.9.norm.query_norm.scale",)}),
        (
            "single_blocks.0.norm.query_norm.scale",
            (9,),
            {"misshapen": {"transformer.single_transformer_blocks.0.attn.norm_q.weight:weight": ((9,), (16,))}},
        ),
    ],
)
def test_incompatible_files_are_rejected(tmp_path: Path, key: str, shape: tuple[int, ...], data: dict[str, Any]) -> None:
    pipe = tiny_pipeline("flux")
    save_file({**control(pipe.transformer), key: torch.ones(shape)}, tmp_path / "x.safetensors")
    before = pipe.transformer.single_transformer_blocks[0].attn.norm_q.weight.clone()
    where = key if "misshapen" not in data else "lora"
    with raises(LoadError, where=where, **data):
        veneer.load(pipe, tmp_path / "x")
    assert veneer.attachments(pipe) == []
    assert torch.equal(pipe.transformer.single_transformer_blocks[0].attn.norm_q.weight, before)


def test_it_is_read_only(tmp_path: Path) -> None:
    with raises(SaveError, given="bfl", expected=("comfyui",)):
        bfl.save(attach(tiny_pipeline("flux"), "lora", rank=2), tmp_path / "x")
