"""Names in kohya's layout are those of real files, for every weight of the real models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from torch import Tensor, nn

from tests.hosts import published
from veneer.formats._names.kohya import NamedLayer, named_layers
from veneer.formats._names.kohya_fused import LoRAFactors, split_factors
from veneer.injection.sites import WeightSite
from veneer.injection.towers import towers_of


def tower_of(name: str) -> Any:
    (tower,) = towers_of(published.build(name))
    return tower


def layer_sites(tower: Any) -> dict[str, WeightSite]:
    return {s.name: s for s in tower.sites if isinstance(s, WeightSite) and s.kind != "embedding"}


def by_site(found: list[NamedLayer]) -> dict[str, tuple[str, ...]]:
    return {place.sites[0].name: place.names for place in found}


def rule_of_sd_scripts(model: nn.Module, prefix: str, inside: tuple[str, ...], root: str = "") -> dict[str, str]:
    """Every linear and convolution below modules of these classes, its path with underscores."""
    found = {}
    for path, module in model.named_modules():
        if type(module).__name__ in inside:
            for below, layer in module.named_modules():
                if type(layer).__name__ in ("Linear", "Conv2d"):
                    found[f"{path}.{below}"] = f"{prefix}_{root}{path}_{below}".replace(".", "_")
    return found


@pytest.mark.parametrize(("base", "count", "with_convs"), [("sd15", 192, 278), ("sd21", 192, 278)])
def test_names_of_sd_are_those_of_sd_scripts(base: str, count: int, with_convs: int) -> None:
    tower = tower_of(base)
    written = {site: names[0] for site, names in by_site(named_layers(tower)).items()}
    attention = rule_of_sd_scripts(tower.module, "lora_unet", ("Transformer2DModel",))
    convolutions = rule_of_sd_scripts(tower.module, "lora_unet", ("ResnetBlock2D", "Downsample2D", "Upsample2D"))
    assert (len(attention), len(attention | convolutions)) == (count, with_convs)
    assert (attention | convolutions).items() <= written.items()
    assert written.keys() == layer_sites(tower).keys()


@pytest.mark.parametrize(("base", "prefix", "count"), [("clip_l", "lora_te", 72), ("clip_bigg", "lora_te2", 192)])
def test_names_of_text_encoders_are_those_of_sd_scripts(base: str, prefix: str, count: int) -> None:
    tower = tower_of(base)
    root = "" if hasattr(tower.module, "text_model") else "text_model_"
    rule = rule_of_sd_scripts(tower.module, prefix, ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"), root)
    written = {site: names[0] for site, names in by_site(named_layers(tower)).items()}
    assert len(rule) == count
    assert rule.items() <= written.items()


def test_names_of_sdxl() -> None:
    """Names that are in published files, and every site's through diffusers' converter back to its own path."""
    tower = tower_of("sdxl")
    names = by_site(named_layers(tower))
    known = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "lora_unet_input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"
        ),
        "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_out_0": (
            "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
        ),
        "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "lora_unet_output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "lora_unet_input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "lora_unet_middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "lora_unet_output_blocks_8_0_out_layers_3": "up_blocks.2.resnets.2.conv2",
        "lora_unet_input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
        "lora_unet_label_emb_0_2": "add_embedding.linear_2",
        "lora_unet_out_2": "conv_out",
    }
    assert {names[path][0]: path for path in known.values()} == known
    assert names.keys() == layer_sites(tower).keys()
    inside = [path for path in names if path.startswith(("down_blocks", "mid_block", "up_blocks"))]
    assert (len([path for path in inside if "attentions" in path]), len(inside)) == (722, 788)
    layers = tower.module.config.layers_per_block
    assert through_diffusers(names, 0, layers) == {path: path for path in names}
    other = {path: n for path, n in names.items() if "add_embedding" not in path}  # in this spelling diffusers does not know it
    assert through_diffusers(other, 1, layers) == {path: path for path in other}


def through_diffusers(names: dict[str, tuple[str, ...]], spelling: int, layers: int) -> dict[str, str]:
    """Site to the path that diffusers' converter makes of its name; the tensors' values say which is which."""
    order = list(names)
    state: dict[str, Tensor] = {}
    for i, path in enumerate(order):
        name = names[path][min(spelling, len(names[path]) - 1)]
        state |= {f"{name}.lora_down.weight": torch.tensor([[float(i)]]), f"{name}.lora_up.weight": torch.ones(1, 1)}
    state = converters._maybe_map_sgm_blocks_to_diffusers(state, SimpleNamespace(layers_per_block=layers))
    converted, _ = converters._convert_non_diffusers_lora_to_diffusers(state)
    back = {}
    for key, tensor in converted.items():
        if "down" in key.rsplit(".lora.", 1)[-1].rsplit("_lora.", 1)[-1]:
            module = key.removeprefix("unet.").rsplit(".lora.down", 1)[0].rsplit("_lora.down", 1)[0].replace(".processor", "")
            back[order[int(tensor)]] = module + (".0" if module.endswith("to_out") else "")
    return back


def test_no_two_weights_have_one_name() -> None:
    for base in ("sd15", "sd21", "sdxl", "flux_dev", "clip_l", "clip_bigg", "t5_xxl"):
        every = [name for place in named_layers(tower_of(base)) for name in place.names]
        assert len(every) == len(set(every)) > 0, base


def test_flux_is_split_as_diffusers_splits_it() -> None:
    """Every module of a file as sd-scripts write it, of FLUX.1's real widths in one block of each kind."""
    with torch.device("meta"):
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(**{**published.FLUX, "num_layers": 1, "num_single_layers": 1})
    (tower,) = towers_of(model)
    state: dict[str, Tensor] = {}
    found = named_layers(tower)
    assert {s.name for place in found for s in place.sites} == layer_sites(tower).keys()
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for place in found:
        d_out, d_in = sum(s.d_out for s in place.sites), place.sites[0].d_in
        pair = LoRAFactors(torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator), 0.5)
        pairs[place.names[0]] = place, pair
        if "final_layer" in place.names[0]:
            pair = pair._replace(scaling=1.0)  # diffusers drops the alpha of the last layer
            pairs[place.names[0]] = place, pair
        state |= {f"{place.names[0]}.lora_down.weight": pair.down, f"{place.names[0]}.lora_up.weight": pair.up}
        state[f"{place.names[0]}.alpha"] = torch.tensor(2 * pair.scaling)
    theirs = converters._convert_kohya_flux_lora_to_diffusers(dict(state))
    for name, (place, pair) in pairs.items():
        for site, part in split_factors(SimpleNamespace(path="x"), name, place, pair):  # type: ignore[arg-type]
            key = site.name if f"{site.name}.lora_A.weight" in theirs else f"transformer.{site.name}"
            want = theirs[f"{key}.lora_B.weight"][:64] @ theirs[f"{key}.lora_A.weight"]
            torch.testing.assert_close(part.scaling * part.up[:64] @ part.down, want, msg=site.name)
