"""IP-Adapters: diffusers' own loader gives the same outputs for the same file, and loads saved ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats.guides import assert_close, form, guided, inputs, output, paper, real, tiny, trained
from tests.raising import raises
from veneer.formats import Options, convert, inspect, ip_adapter, read
from veneer.injection import LoadError, SaveError
from veneer.testing.pipelines import tiny_pipeline

WIDTH, DIM = 12, 64  # of an embedding, of the resampler


def sizes(unet: Any, kind: str, tokens: int = 4) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file, by the order in which diffusers' loader asks for them."""
    context = unet.config.cross_attention_dim
    if kind == "base":
        found: dict[str, tuple[int, ...]] = {"proj.weight": (tokens * context, WIDTH), "proj.bias": (tokens * context,)}
        found |= {"norm.weight": (context,), "norm.bias": (context,)}
    else:
        found = {"latents": (1, 5, DIM), "proj_in.weight": (DIM, WIDTH), "proj_in.bias": (DIM,)}
        found |= {"proj_out.weight": (context, DIM), "proj_out.bias": (context,), "norm_out.weight": (context,)}
        found |= {"norm_out.bias": (context,)}
        for i in range(4):
            layer: dict[str, tuple[int, ...]] = {
                f"0.{norm}.{end}": (DIM,) for norm in ("norm1", "norm2") for end in ("weight", "bias")
            }
            layer |= {"0.to_q.weight": (DIM, DIM), "0.to_kv.weight": (2 * DIM, DIM), "0.to_out.weight": (DIM, DIM)}
            layer |= {"1.0.weight": (DIM,), "1.0.bias": (DIM,), "1.1.weight": (4 * DIM, DIM), "1.3.weight": (DIM, 4 * DIM)}
            found |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    found = {f"image_proj.{name}": shape for name, shape in found.items()}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            found |= {f"ip_adapter.{number}.{part}_ip.weight": (width, context) for part in ("to_k", "to_v")}
            number += 2
    return found


def state(unet: Any, kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in sizes(unet, kind).items()}


def nested(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups = ("image_proj", "ip_adapter")
    return {g: {k.removeprefix(f"{g}."): t for k, t in flat.items() if k.startswith(f"{g}.")} for g in groups}


def embeds(kind: str) -> Tensor:
    return torch.randn((2, 6, WIDTH) if kind == "plus" else (2, WIDTH), generator=torch.Generator().manual_seed(5))


def by_diffusers(unet: Any, flat: Mapping[str, Tensor], kind: str) -> Tensor:
    unet._load_ip_adapter_weights([nested(flat)], low_cpu_mem_usage=False)
    return called(unet, kind)


@torch.no_grad()
def called(unet: Any, kind: str) -> Tensor:
    call = inputs(unet)
    call["added_cond_kwargs"] = {**call.get("added_cond_kwargs", {}), "image_embeds": [embeds(kind)[:, None]]}
    found: Tensor = unet(**call).sample
    return found


@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_a_file_round_trip(model: str, kind: str, tmp_path: Path) -> None:
    unet = tiny(model)
    flat = state(unet, kind)
    save_file(flat, tmp_path / "x.safetensors")
    attachment = veneer.load(unet, tmp_path / "x")
    assert attachment.loaded.clean
    changed = guided(unet, attachment, embeds=embeds(kind))
    assert (changed - output(tiny(model))).abs().max() > 1e-3
    assert_close(changed, by_diffusers(tiny(model), flat, kind))
    after = load_file(ip_adapter.save(attachment, tmp_path / "y"))
    assert after.keys() == flat.keys()
    assert all(torch.equal(after[key], flat[key]) for key in flat)


@pytest.mark.parametrize("options", [{"width": WIDTH}, {"kind": "plus", "width": WIDTH, "tokens": 5, "dim": DIM}])
def test_ours_is_a_file_for_a_pipeline_of_diffusers(options: dict[str, Any], tmp_path: Path) -> None:
    kind = options.get("kind", "base")
    ours, theirs = (tiny_pipeline("sd") for _ in range(2))
    attachment = trained(veneer.attach(ours, "ip_adapter", **options))
    ip_adapter.save(attachment, tmp_path / "x.safetensors")
    theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name="x.safetensors", image_encoder_folder=None)
    found = guided(ours.unet, attachment, embeds=embeds(kind), pipeline=ours.unet)
    assert_close(found, called(theirs.unet, kind))
    again = veneer.load(tiny_pipeline("sd"), tmp_path / "x").method
    assert all(getattr(again, name) == value for name, value in options.items())


def test_names_and_shapes_at_real_widths() -> None:
    unet = real("sd1")
    attachment = veneer.attach(unet, "ip_adapter")
    found = {key: tuple(t.shape) for key, t in ip_adapter.tensors(attachment, Path("x")).items()}
    keys = [f"ip_adapter.{i}.to_{part}_ip.weight" for i in range(1, 32, 2) for part in "kv"]
    layers = {key: found[key] for key in keys}
    assert len(found) == len(layers) + 4
    assert [layers[f"ip_adapter.{i}.to_k_ip.weight"][0] for i in range(1, 32, 2)] == (
        [320, 320, 640, 640, 1280, 1280] + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
    )
    assert {shape[1] for shape in layers.values()} == {768}
    assert found["image_proj.proj.weight"] == (3072, 1024)
    assert sum(p.numel() for p in attachment.parameters()) == 22_319_616


def test_another_family() -> None:
    unet = real("sd1")
    shapes = {key: shape for key, shape in sizes(tiny("sd1"), "base").items() if key.startswith("image_proj.")}
    file = paper({**shapes, **{f"ip_adapter.1.to_{part}_ip.weight": (640, 2048) for part in "kv"}})
    with raises(LoadError, family="Stable Diffusion XL", unused=()) as caught:
        ip_adapter.IPAdapter().load(unet, file, Options())
    assert caught.value.missing[0] == "ip_adapter.3.to_k_ip.weight"
    assert len(caught.value.missing) == 30
    assert caught.value.misshapen["ip_adapter.1.to_k_ip.weight"] == ((640, 2048), (320, 768))
    assert veneer.attachments(unet) == []


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"image_proj.proj.0.weight": (24, 12), "image_proj.norm.weight": (24,)}, "IP-Adapter FaceID"),
        ({"ip_adapter.0.to_q_lora.down.weight": (4, 8)}, "IP-Adapter FaceID"),
        (
            {"image_proj.perceiver_resampler.proj_in.weight": (24, 12), "image_proj.proj.0.weight": (24, 12)},
            "IP-Adapter FaceID Plus",
        ),
        ({"image_proj.proj.0.weight": (24, 12), "image_proj.proj.3.weight": (24,)}, "IP-Adapter Full Face"),
        ({"ip_adapter_proj_model.proj.weight": (24, 12)}, "IP-Adapter for FLUX"),
        ({"ip_adapter.0.to_k_ip.bias": (8,)}, "IP-Adapter for FLUX"),
        ({"ip_adapter.0.norm_ip.linear.weight": (8, 8)}, "IP-Adapter for Stable Diffusion 3"),
    ],
)
def test_other_networks_are_named(more: dict[str, tuple[int, ...]], what: str) -> None:
    file = paper({"ip_adapter.1.to_k_ip.weight": (8, 24), **more})
    assert form(file) == "ip_adapter"
    with raises(LoadError, given=what) as caught:
        ip_adapter.IPAdapter().load(tiny("sd1"), file, Options())
    assert caught.value.where in more


def test_missing_unused_and_misshapen(tmp_path: Path) -> None:
    unet = tiny("sd1")
    flat = state(unet, "base")
    del flat["ip_adapter.3.to_v_ip.weight"]
    save_file({**flat, "image_proj.more": torch.ones(2), "image_proj.proj.bias": torch.ones(3)}, tmp_path / "x.safetensors")
    with raises(
        LoadError,
        missing=("ip_adapter.3.to_v_ip.weight",),
        unused=("image_proj.more",),
        misshapen={"image_proj.proj.bias": ((3,), (96,))},
    ):
        veneer.load(unet, tmp_path / "x")
    assert veneer.attachments(unet) == []
    report = veneer.load(unet, tmp_path / "x", strict=False).loaded
    assert report.unused == ("image_proj.more",)
    assert len(report.missing) == 1
    assert report.missing[0].endswith("to_v_ip.weight")


@pytest.mark.parametrize(
    ("shapes", "data"),
    [
        ({}, {"where": "image_proj.proj.weight", "given": None}),
        (
            {"image_proj.proj.weight": (9, 12), "image_proj.norm.weight": (24,)},
            {"where": "image_proj.proj.weight", "given": 9},
        ),
        (
            {"image_proj.latents": (1, 10**6, 0), "image_proj.proj_in.weight": (10**6, 0)},
            {"option": "width", "given": 0, "expected": 1},
        ),
        (
            {
                "image_proj.latents": (1, 10**6, 0), "image_proj.proj_in.weight": (10**6, 1), "image_proj.layers.999999.0": (1,),
            },
            {"option": "", "given": None},
        ),
        (
            {
                "image_proj.latents": (1, 4, 8), "image_proj.proj_in.weight": (8, 4),
                **{f"image_proj.layers.{i}.0": (1,) for i in range(65)},
            },
            {"given": 65, "expected": 64},
        ),
    ],
)  # fmt: skip
def test_claims_are_bounded(shapes: dict[str, tuple[int, ...]], data: dict[str, Any]) -> None:
    file = paper({"ip_adapter.1.to_k_ip.weight": (8, 24), **shapes})
    for strict in (True, False):
        with raises(LoadError, file="x.safetensors", **data) as caught:
            ip_adapter.IPAdapter().load(tiny("sd1"), file, Options(strict=strict))
        assert bool(caught.value.missing) is (data == {"option": "", "given": None})


@pytest.mark.parametrize(("options", "given"), [({"tokens": 8}, "8 tokens"), ({"kind": "plus", "depth": 2}, "2 layers")])
def test_what_is_not_written(options: dict[str, Any], given: str, tmp_path: Path) -> None:
    attachment = veneer.attach(tiny("sdxl"), "ip_adapter", **{"width": WIDTH, **options})
    with raises(SaveError, where="ip_adapter", given=given, expected=4):
        ip_adapter.save(attachment, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_some_layers_are_no_file(tmp_path: Path) -> None:
    unet = tiny("sd1")
    every = veneer.attach(unet, "ip_adapter", width=WIDTH)
    first, *others = every.parts
    every.detach()
    attachment = veneer.attach(unet, "ip_adapter", width=WIDTH, where=[f"name:{name}" for name in others])
    with raises(SaveError, where="ip_adapter", expected=(first,)):
        ip_adapter.save(attachment, tmp_path / "x")


def test_inspection_and_conversion(tmp_path: Path) -> None:
    unet = tiny("sd1")
    flat = state(unet, "base")
    save_file(flat, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x", unet)
    assert (found.format, found.fits) == ("ip_adapter", True)
    assert {block.name: block.values for block in found.blocks} == {
        start: sum(t.numel() for k, t in flat.items() if k.startswith(start)) for start in ("image_proj", "ip_adapter")
    }
    convert(unet, tmp_path / "x", "native", tmp_path / "n.safetensors")
    convert(unet, tmp_path / "n.safetensors", "ip_adapter", tmp_path / "y.safetensors")
    assert read(tmp_path / "y").shapes == read(tmp_path / "x").shapes
    with raises(LoadError, expected="cross-attention"):
        veneer.load(tiny_pipeline("dit"), tmp_path / "x")
