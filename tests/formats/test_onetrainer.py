"""LoRA as OneTrainer writes it: diffusers reads its FLUX files; token embeddings are bundled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats.cases import deltas, fill
from tests.formats.low_rank import assert_same, expected, in_peft, tuned
from tests.raising import raises
from veneer.formats import convert, format_of, inspect, kohya, native, onetrainer, read
from veneer.formats._names.modules import original_modules
from veneer.injection import LoadError, attach
from veneer.injection.towers import towers_of
from veneer.testing.pipelines import tiny_pipeline

WHERE = {
    "flux": ["attn", "mlp", "single", "adaln", "text/attn", "text_2/attn"],
    "sd3": ["attn", "mlp", "text/attn", "text_2/attn", "text_3/attn"],
    "pixart": ["attn", "xattn", "mlp", "text/attn"],
}
PREFIXES = {
    "sd": ["lora_te", "lora_unet"], "sdxl": ["lora_te1", "lora_te2", "lora_unet"],
    "flux": ["lora_te1", "lora_te2", "lora_transformer"], "pixart": ["lora_te", "lora_transformer"],
    "sd3": ["lora_te1", "lora_te2", "lora_te3", "lora_transformer"],
}  # fmt: skip


@pytest.mark.parametrize("family", WHERE)
def test_written_and_read_it_is_the_same_change(tmp_path: Path, family: str) -> None:
    attachment = tuned(family, WHERE[family])
    path = onetrainer.save(attachment, tmp_path)
    assert format_of(read(path)).name == "onetrainer"
    assert_same(deltas(veneer.load(tiny_pipeline(family), path)), expected(attachment))


@pytest.mark.parametrize("family", PREFIXES)
def test_prefixes_count_the_pipelines_text_encoders(tmp_path: Path, family: str) -> None:
    pipe = tiny_pipeline(family)
    places = [place for tower in towers_of(pipe) for place in onetrainer.OneTrainer().places(tower)]
    found = {"_".join(name.split("_")[:2]) for place in places for name in place.names}
    assert sorted(found) == PREFIXES[family]
    first = tuned(family, "text/attn.q", rank=1)
    (prefix,) = {"_".join(key.split("_")[:2]) for key in load_file(onetrainer.save(first, tmp_path / "x"))}
    assert prefix == PREFIXES[family][0]


def test_diffusers_makes_the_same_change(tmp_path: Path) -> None:
    """Of attention, the only layers whose names its converter supports completely."""
    attachment = tuned("flux", ["attn", "text/attn", "text/mlp"], rank=4)
    path = onetrainer.save(attachment, tmp_path / "x")
    plain = tiny_pipeline("flux")
    plain.load_lora_weights(path)
    assert_same(in_peft(plain.components), deltas(attachment))


def test_unets_are_named_as_kohyas_readers_take_them(tmp_path: Path) -> None:
    """diffusers' paths with underscores, for SDXL too, without token embeddings."""
    attachment = tuned("sdxl", ["attn", "mlp", "text/attn", "text_2/attn"], rank=3)
    path = onetrainer.save(attachment, tmp_path / "x")
    assert format_of(read(path)).name == "kohya"
    state, alphas = converters._convert_non_diffusers_lora_to_diffusers(dict(load_file(path)))
    assert len(alphas) == len(attachment.parts) == len(state) / 2
    assert_same(deltas(veneer.load(tiny_pipeline("sdxl"), path)), deltas(attachment))


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl"])
def test_omi_names_with_numbered_projections(tmp_path: Path, family: str) -> None:
    """`transformer.double_blocks.0.img_attn.qkv.0` is the query's projection: LoRA of each projection, not of the fused one."""
    pipe = tiny_pipeline(family)
    main = towers_of(pipe)[0]
    prefix = "unet" if family == "sdxl" else "transformer"
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    want = {}
    for module in original_modules(main):
        several = len(module.sites) > 1
        for i, site in enumerate(module.sites):
            path = "img_in.proj" if module.path == "img_in" else module.path
            name = f"{prefix}.{path}.{i}" if several else f"{prefix}.{path}"
            down, up = (
                torch.randn(2, *site.weight_shape[1:], generator=generator),
                torch.randn(site.d_out, 2, generator=generator),
            )
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
            rows = torch.cat(up.chunk(2)[::-1]) if module.swapped else up
            want[site.name] = 0.5 * (rows.double() @ down.double().flatten(1)).reshape(site.weight_shape)
    save_file(state, tmp_path / "x.safetensors")
    loaded = veneer.load(pipe, tmp_path / "x")
    assert_same(deltas(loaded), want)


def test_token_embeddings_are_included(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sdxl")
    words = [
        fill(attach(pipe, "textual_inversion", tokens=t, vectors=n, name=f"w{n}"), seed=n) for t, n in (("<a.b>", 2), ("<c>", 1))
    ]
    lora = fill(attach(pipe, "lora", rank=2, where=["attn", "text/attn"]), std=0.2)
    path = onetrainer.save([*words, lora], tmp_path / "x")
    assert {k for k in load_file(path) if k.startswith("bundle")} == {
        f"bundle_emb.{word}.{clip}" for word in ("<a.b>", "<c>") for clip in ("clip_l", "clip_g")
    }
    loaded = veneer.load_all(tiny_pipeline("sdxl"), path)
    assert [a.method.name for a in loaded] == ["textual_inversion", "textual_inversion", "lora"]
    assert [(a.method.each, a.method.vectors) for a in loaded[:2]] == [(("<a.b>",), 2), (("<c>",), 1)]
    for was, now in zip(words, loaded, strict=False):
        assert all(torch.equal(now.state_dict()[k], t) for k, t in was.state_dict().items())
    assert_same(deltas(loaded[2]), deltas(lora))


def test_conversion_keeps_token_embeddings(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    words = fill(attach(pipe, "textual_inversion", tokens="<toy>", vectors=2))
    lora = fill(attach(pipe, "lora", rank=2, where="attn.q"), std=0.2)
    done = convert(tiny_pipeline("sd"), native.save([words, lora], tmp_path / "a"), "onetrainer", tmp_path / "b")
    assert done.files == (tmp_path / "b.safetensors",)
    first, second = veneer.load_all(tiny_pipeline("sd"), tmp_path / "b")
    assert all(torch.equal(first.state_dict()[k], t) for k, t in words.state_dict().items())
    assert_same(deltas(second), deltas(lora))


def test_token_embeddings_beside_kohyas_names_and_as_a1111_bundles_them(tmp_path: Path) -> None:
    lora = tuned("sdxl", ["attn", "text/attn"], rank=2)
    words = {"bundle_emb.toy-a.string_to_param.*": torch.ones(2, 28), "bundle_emb.toy-b.clip_l": torch.ones(24)}
    save_file({**load_file(kohya.save(lora, tmp_path / "x")), **words}, tmp_path / "y.safetensors")
    first, second, loaded = veneer.load_all(tiny_pipeline("sdxl"), tmp_path / "y")
    assert [site.component for site, _ in (*first.parts.values(), *second.parts.values())] == ["text_encoder_2", "text_encoder"]
    assert_same(deltas(loaded), deltas(lora))
    (told,) = [b for b in inspect(tmp_path / "y").blocks if b.name.startswith("bundle_emb.toy-a")]
    assert (told.method, told.values) == ("textual_inversion", 56)


def test_other_methods_have_the_ends_of_lycoris(tmp_path: Path) -> None:
    """LoHa of FLUX, under OneTrainer's names: (B1 A1) ∘ (B2 A2), times alpha / rank."""
    name, generator = "lora_transformer_transformer_blocks_0_attn_to_q", torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}
    parts = {end: torch.randn(shape, generator=generator) for end, shape in shapes.items()}
    save_file({f"{name}.{end}": t for end, t in parts.items()} | {f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    assert format_of(read(tmp_path / "x")).name == "onetrainer"
    assert [layer.method for layer in onetrainer.OneTrainer().layers(read(tmp_path / "x"))] == ["loha"]
    pipe = tiny_pipeline("flux")
    before = pipe.transformer.transformer_blocks[0].attn.to_q.weight.detach().clone()
    loaded = veneer.load(pipe, tmp_path / "x")
    loaded.merge()
    one, two = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
    after = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    torch.testing.assert_close(after - before, 0.5 * one * two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "data"),
    [
        ({"bundle_emb.<a>.clip_l_out": torch.ones(1, 24)}, {"where": "bundle_emb.<a>.clip_l_out", "given": "clip_l_out"}),
        ({"bundle_emb.<a>.clip_l": torch.ones(1, 25)}, {"where": "text_encoder", "given": 25, "expected": 24}),
        ({"bundle_emb.<a>.t5": torch.ones(1, 24)}, {"given": ("t5",), "expected": {"text_encoder": 24}}),
    ],
)
def test_incompatible_token_embeddings(tmp_path: Path, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    pipe = tiny_pipeline("sd")
    with raises(LoadError, **data):
        veneer.load(pipe, tmp_path / "x")
    assert veneer.attachments(pipe) == []


def test_a_weight_under_two_names_is_rejected(tmp_path: Path) -> None:
    pair = {"lora_down.weight": torch.ones(1, 32), "lora_up.weight": torch.ones(32, 1)}
    names = ("lora_transformer_transformer_blocks_0_attn_to_q", "transformer.double_blocks.0.img_attn.qkv.0")
    save_file({f"{n}.{k}": t.clone() for n in names for k, t in pair.items()}, tmp_path / "x.safetensors")
    with raises(LoadError, where="transformer.transformer_blocks.0.attn.to_q"):
        veneer.load(tiny_pipeline("flux"), tmp_path / "x")


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_the_default_dora_has_a_magnitude_per_input(tmp_path: Path, kind: str) -> None:
    """`dora_scale` (1, d_in): W' = m·(W + ΔW) / ‖W + ΔW‖ with the norm of each input's column."""
    name, generator = "lora_transformer_single_transformer_blocks_1_proj_mlp", torch.Generator().manual_seed(0)
    pipe = tiny_pipeline("flux")
    before = pipe.transformer.single_transformer_blocks[1].proj_mlp.weight.detach().clone()
    out, width = before.shape
    lora = {"lora_down.weight": (2, width), "lora_up.weight": (out, 2)}
    parts = lora if kind == "lora" else {"lokr_w1": (4, 2), "lokr_w2": (out // 4, width // 2)}
    given = {end: torch.randn(shape, generator=generator) * 0.3 for end, shape in parts.items()}
    m = torch.rand(1, width, generator=generator) + 0.5
    rest = {f"{name}.dora_scale": m, f"{name}.alpha": torch.tensor(2.0)}
    save_file({f"{name}.{end}": t for end, t in given.items()} | rest, tmp_path / "x.safetensors")
    loaded = veneer.load(pipe, tmp_path / "x")
    assert loaded.method.name == {"lora": "dora", "lokr": "lokr"}[kind]
    change = given["lora_up.weight"] @ given["lora_down.weight"] if kind == "lora" else torch.kron(*given.values())
    after = before + change
    loaded.merge()
    got = dict(loaded.host_state_dict("transformer"))["single_transformer_blocks.1.proj_mlp.weight"]
    torch.testing.assert_close(got, m * after / after.norm(dim=0, keepdim=True), rtol=1e-5, atol=1e-5)
