"""Published models on the meta device take LoRA with the published counts; all sites are named, all uncovered layers listed."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from tests.hosts.published import build
from veneer.injection import attach
from veneer.injection.attachment.attachment import Attachment
from veneer.injection.sites import WeightSite
from veneer.injection.towers import sites

PARAMETERS = {
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "sd3_medium": 2_028_328_000,
    "flux_dev": 11_901_408_320,
    "pixart_alpha": 611_349_152,
    "dit_xl_2": 749_826_464,
    "clip_l": 123_060_480,
}
# model, selection, sites, parameters per rank
LORA = [
    ("sd15", "attn xattn", 128, 199_296),
    ("sd15", "xattn", 64, 99_456),
    ("sd15", "xattn.{k,v}", 32, 49_536),
    ("sd15", "mlp", 32, 174_720),
    ("sd15", "proj", 32, 49_920),
    ("sd15", "attn xattn mlp proj", 192, 423_936),
    ("sd15", "attn xattn mlp proj conv.{res,sample} time.res", 278, 1_050_816),
    ("sdxl", "attn xattn", 560, 1_451_520),
    ("sdxl", "xattn", 280, 785_920),
    ("sdxl", "xattn.{k,v}", 140, 453_120),
    ("sdxl", "mlp", 140, 1_164_800),
    ("sdxl", "proj", 22, 43_520),
    ("sdxl", "attn xattn mlp proj", 722, 2_659_840),
    ("sdxl", "attn xattn mlp proj conv.{res,sample} time.res", 788, 3_074_240),
    ("sd3_medium", "attn", 191, 586_752),
    ("flux_dev", "attn mlp", 342, 2_801_664),
    ("pixart_alpha", "attn xattn", 224, 516_096),
    ("dit_xl_2", "attn", 112, 258_048),
    ("clip_l", "attn mlp", 72, 165_888),
    ("clip_l", "attn", 48, 4 * 12 * 2 * 768),
]


@functools.cache
def model(name: str) -> nn.Module:
    return build(name)


def lora(name: str, where: str | None = None, rank: int = 1) -> Attachment:
    """Attached to the cached model; the caller detaches."""
    return attach(model(name), "lora", where=where, rank=rank)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_model_is_the_published_one(name: str) -> None:
    assert sum(p.numel() for p in model(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "where", "count", "parameters"), LORA)
def test_lora_takes_the_published_sites_and_parameters(name: str, where: str, count: int, parameters: int) -> None:
    tuned = lora(name, where, rank=4)
    try:
        assert (len(tuned.parts), tuned.report().trainable) == (count, 4 * parameters)
        assert sum(tuned.method.count(site) for site, _ in tuned.parts.values()) == 4 * parameters
    finally:
        tuned.detach()


@pytest.mark.parametrize("name", [n for n in PARAMETERS if n != "clip_l"])
def test_every_layer_is_named_and_adapted_where_it_says(name: str) -> None:
    """A site's name leads to its weight in the bare model; with every role selected, LoRA holds a pair for every layer."""
    bare = model(name)
    layers = {n: m for n, m in bare.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))}
    weights = [s for s in sites(bare) if isinstance(s, WeightSite)]
    assert {s.name for s in weights} == set(layers)
    for site in weights:
        assert tuple(layers[site.name].weight.shape) == site.weight_shape
    tuned = lora(name, "*")
    try:
        assert {key.rpartition(":")[0] for key in tuned.state_dict()} == set(layers)
        assert all(t.is_meta for t in tuned.state_dict().values())
    finally:
        tuned.detach()


def uneven(name: str, where: str | None = None) -> dict[str, tuple[str, ...]]:
    tuned = lora(name, where)
    report = tuned.report()
    tuned.detach()
    assert ("uneven" in str(report)) == bool(report.uneven)
    return {f"{r.stage}:{r.block}": r.missing_roles for r in report.uneven}


def test_even_coverage_is_not_called_uneven() -> None:
    assert uneven("pixart_alpha") == uneven("dit_xl_2") == uneven("clip_l") == {}


def test_the_single_blocks_of_flux_lack_what_only_double_blocks_have() -> None:
    lacking = uneven("flux_dev", "attn mlp")
    assert len(lacking) == 38
    words = {f"attn.context.{x}" for x in ("q", "k", "v", "out")}
    words |= {f"mlp.{x}" for x in ("in", "out", "context.in", "context.out")}
    assert {b.partition(":")[0] for b in lacking} == {"single"}
    assert all(set(roles) == words | {"attn.out"} for roles in lacking.values())


def test_the_last_block_of_sd3_gives_no_text_and_its_text_queries_are_inert() -> None:
    assert uneven("sd3_medium", "attn mlp") == {":23": ("attn.context.out", "mlp.context.in", "mlp.context.out")}
    tuned = lora("sd3_medium", "attn")
    inert = tuned.report().inert
    tuned.detach()
    assert inert == ("transformer_blocks.23.attn.add_q_proj",)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_levels_of_a_unet_without_attention_are_seen(name: str) -> None:
    """SD 1.5 has no attention at its lowest level, SDXL none at its highest; with only `attn` asked for, the table shows it."""
    every = tuple(sorted(f"{kind}.{x}" for kind in ("attn", "xattn") for x in ("q", "k", "v", "out")))
    bare = ("down.3", "up.0") if name == "sd15" else ("down.0", "up.2")
    assert uneven(name, "attn xattn") == {f"{stage}:": every for stage in bare}


def test_attaching_to_meta_costs_no_memory() -> None:
    tuned = lora("flux_dev", rank=16)
    assert all(p.is_meta for p in tuned.parameters())
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    tuned.detach()
