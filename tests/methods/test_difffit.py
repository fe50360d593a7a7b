"""DiffFit: γ ∘ (W x + b) + db, against the host with the changed tensors written out; branches block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from tests.hosts.published import build
from tests.methods.bottlenecks import blocks_written_out, branch, picture, random, stirred, tiny
from tests.methods.transformer_blocks import equal_models
from tests.raising import raises
from veneer.injection import SelectionError, attach, hosts
from veneer.methods.hybrid.difffit import BranchGain

PORT = ("bias", "norm", "attn", "xattn", "mlp", "not:mlp.in", "not:mlp.out")


def part_of(site: Any) -> slice:
    return slice(*site.rows) if site.rows else slice(None)


def written_out(base: nn.Module, tuned: Any) -> dict[str, Tensor]:
    """The tensors of the host: W' = diag(γ) W, b' = γ ∘ b + db, and t' = t + dt for norm scales and tables."""
    tensors = {name: p.detach().clone() for name, p in base.named_parameters(remove_duplicate=False)}
    for site, adapter in tuned.parts.values():
        if hasattr(adapter, "gain"):
            rows, gamma = part_of(site), 1 + adapter.gain
            factor = torch.ones(len(tensors[f"{site.path}.weight"]), dtype=gamma.dtype)
            factor = torch.cat([factor[: rows.start or 0], gamma, factor[rows.stop or len(factor) :]])
            tensors[f"{site.path}.weight"] = factor[:, None] * tensors[f"{site.path}.weight"]
            if site.bias:
                shifts = torch.arange(len(factor))[slice(*site.bias_rows) if site.bias_rows else slice(None)]
                tensors[site.bias] = (factor * tensors[site.bias]).index_add(0, shifts, adapter.shift)
    for site, adapter in tuned.parts.values():
        if not hasattr(adapter, "gain"):
            path = f"{site.path}.{site.param}"
            leaf = ("norm1.emb." + site.name.split("norm1.emb.")[-1]).replace(".", "_")
            delta = adapter.shared.deltas[leaf] if "norm1.emb." in site.name else adapter.delta
            indices = torch.arange(len(tensors[path]))[part_of(site)]
            tensors[path] = tensors[path].index_add(0, indices, delta)
    return tensors


def small(host: str, key: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Two equal models, and their inputs."""
    models = equal_models(host, key)
    inputs = hosts.get(host)().sample(models[0])
    return *models, {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize(
    ("host", "key"), [("timm_vit", "vit"), ("diffusers_dit", "dit"), ("diffusers_dit", "pixart"), ("diffusers_unet", "sd1")]
)
def test_values_and_gradients(host: str, key: str) -> None:
    base, model, inputs = small(host, key)
    start = first(base(**inputs)).detach()
    tuned = attach(model, "difffit")
    assert torch.equal(first(model(**inputs)), start)
    stirred(tuned)
    expected = first(functional_call(base, written_out(base, tuned), args=(), kwargs=inputs))
    got = first(model(**inputs))
    torch.testing.assert_close(got, expected)
    assert (got - start).abs().max() > 1e-3
    parameters = list(tuned.parameters())
    pairs = [torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) for y in (got, expected)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
    assert all(a is not None for a in pairs[0])
    if key == "dit":
        tuned.merge()
        torch.testing.assert_close(first(model(**inputs)), expected)


def test_copies_of_embedders_share_their_deltas(tmp_path: Path) -> None:
    """In diffusers' DiT each block has embedders of timesteps and classes; a file has one delta for all blocks."""
    _, model, _ = small("diffusers_dit", "dit")
    tuned = attach(model, "difffit")
    shared = {id(a.shared) for s, a in tuned.parts.values() if "norm1.emb." in s.name and not list(a.parameters(recurse=False))}
    assert len(shared) == 1
    stored = load_file(tuned.save(tmp_path / "x.safetensors"))
    assert len([name for name in stored if "embedder" in name]) == 3
    assert {s.depth for s, _ in tuned.parts.values() if "norm1.emb." in s.name} == {0, 1}


def test_scales_of_branches() -> None:
    """x' = x + γ₁ ∘ Attn(LN x); x' + γ₂ ∘ MLP(LN x'), with γ at q, k, v and the output of attention."""
    bare, model = tiny(), tiny()
    tuned = attach(model, "difffit", where=("attn", "mlp", "not:mlp.in", "not:mlp.out"))
    adapters: Any = stirred(tuned)

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        prefix = f"blocks.{depth}."
        gain = {name.removeprefix(prefix): 1 + a.gain for name, a in adapters.items() if name.startswith(prefix)}
        shift = [adapters[f"{prefix}attn.{n}"].shift for n in ("q", "k", "v", "proj")]
        qkv = torch.cat([gain[f"attn.{n}"] for n in "qkv"]) * b.attn.qkv(b.norm1(x)) + torch.cat(shift[:3])
        q, k, v = (t.unflatten(-1, (b.attn.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        attention = (q @ k.mT * b.attn.scale).softmax(-1) @ v
        out = gain["attn.proj"] * b.attn.proj(attention.transpose(1, 2).flatten(2)) + shift[3]
        x = x + gain["attn.branch"] * out
        return x + gain["mlp.branch"] * b.mlp(b.norm2(x))

    expected = blocks_written_out(bare, block, picture())
    torch.testing.assert_close(model(picture()), expected)
    for layout, shape in (("NLC", (5,)), ("NHWC", (5,)), ("NCHW", (5, 1, 1))):
        adapter: Any = BranchGain(branch(layout)).double()
        adapter.gain.data = random(5, seed=2)
        y = random(2, 4, 5) if layout == "NLC" else random(2, *((3, 4, 5) if layout == "NHWC" else (5, 3, 4)))
        torch.testing.assert_close(adapter.output(y, y), y * (1 + adapter.gain).view(shape))


def test_published_counts() -> None:
    """DiT-XL/2 with 101 classes 832,928: biases 489,632, scales 225,792, table 117,504. The port on SD 1.5."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        sizes = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8, "sample_size": 32}
        dit = DiTTransformer2DModel(**sizes, num_embeds_ada_norm=101)
    assert attach(vit, "difffit").report().trainable == 102_912 + 19_200 + 12 * 7 * 768
    assert attach(build("sd15"), "difffit", where=PORT).report().trainable == 581_124
    tuned = attach(dit, "difffit")
    assert tuned.report().trainable == 832_928
    gains = sum(a.gain.numel() for _, a in tuned.parts.values() if hasattr(a, "gain"))
    table = tuned.parts["transformer_blocks.0.norm1.emb.class_embedder.embedding_table"][1].shared.deltas
    assert (gains, table["norm1_emb_class_embedder_embedding_table"].numel()) == (28 * 7 * 1152, 102 * 1152)


def test_a_layer_and_its_bias_have_one_adapter() -> None:
    """Also where the bias belongs to a fused layer; biases of layers without a scale keep theirs."""
    tuned = attach(tiny(), "difffit", where=("bias.attn", "attn.qkv"))
    assert [name for name in tuned.parts if name.startswith("blocks.0")] == ["blocks.0.attn.qkv", "blocks.0.attn.proj.bias"]
    with raises(SelectionError, pattern="class.embed"):
        attach(tiny(), "difffit", where=("bias", "class.embed"))
