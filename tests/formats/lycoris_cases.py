"""LyCORIS' own modules as the reference: files that they save, their weight updates, and files that they load."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from veneer.formats._names.kohya import NamedLayer, named_layers
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.towers import towers_of

lycoris = pytest.importorskip("lycoris.modules", reason="LyCORIS is not installed")
from lycoris.wrapper import network_module_dict as ALGOS  # noqa: E402

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
SITES = {
    "sd": [
        "unet.down_blocks.0.resnets.0.conv1",
        "unet.down_blocks.0.attentions.0.proj_in",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
    ],
    "sdxl": [
        "unet.mid_block.attentions.0.proj_in",
        "unet.mid_block.resnets.0.conv1",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
    ],
    "flux": [
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.1.proj_mlp",
        "transformer.norm_out.linear",
        "transformer.x_embedder",
    ],
}


def tower_of(pipe: Any, place: NamedLayer) -> Any:
    return getattr(pipe, place.sites[0].component)


def layer(pipe: Any, place: NamedLayer) -> nn.Module:
    """A layer with the weight of a named layer, as the original model has it."""
    tower, site = tower_of(pipe, place), place.sites[0]
    base = copy.deepcopy(tower.get_submodule(site.path))
    weight = torch.cat([base_tensor(tower, s.path, s.param).detach() for s in place.sites])
    if place.swapped:
        weight = torch.cat(weight.chunk(2)[::-1])
    if isinstance(base, nn.Linear):
        base = nn.Linear(weight.shape[1], len(weight), bias=False)
    base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return base


def chosen(pipe: Any, sites: Sequence[str]) -> list[NamedLayer]:
    """The named layers of these sites."""
    numbered = hasattr(pipe, "text_encoder_2")
    every = [place for tower in towers_of(pipe) for place in named_layers(tower, numbered)]
    found = [place for place in every if {site.name for site in place.sites} & set(sites)]
    assert len(found) == len(sites)
    return found


def made(pipe: Any, place: NamedLayer, algo: str, **options: Any) -> Any:
    """A module of LyCORIS for a named layer, with random values."""
    module = ALGOS[algo](place.names[0], layer(pipe, place), 1.0, **options)
    generator = torch.Generator().manual_seed(len(place.names[0]))
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name == "dora_scale":
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1 if name == "rescale" else 0))
    return module


def change(module: Any) -> Tensor:
    """W' − W as a module's forward pass has it. `get_diff_weight` of LoHa and LoKr applies the scale twice."""
    with torch.no_grad():
        if hasattr(module, "get_weight"):
            delta = module.get_weight(module.shape)
            if not module.wd:
                return delta.double()
            return module.apply_weight_decompose(module.org_weight + delta).double() - module.org_weight.double()
        return module.get_merged_weight()[0].double() - module.org_weight.double()


def by_site(place: NamedLayer, delta: Tensor) -> dict[str, Tensor]:
    """The rows of each site of a named layer."""
    if place.swapped:
        delta = torch.cat(delta.chunk(2)[::-1])
    rows = delta.split([site.d_out for site in place.sites])
    return {site.name: part.reshape(site.weight_shape) for site, part in zip(place.sites, rows, strict=True)}


def state(module: Any) -> dict[str, Tensor]:
    return {f"{module.lora_name}.{key}": t.detach().clone().contiguous() for key, t in module.state_dict().items()}


def write(path: Path, modules: Sequence[Any]) -> Path:
    save_file({key: t for module in modules for key, t in state(module).items()}, path)
    return path


def read(pipe: Any, path: Path) -> dict[str, Tensor]:
    """Weight updates of LyCORIS for a file, by site."""
    tensors, found = load_file(path), {}
    names = dict.fromkeys(key.partition(".")[0] for key in tensors)
    numbered = hasattr(pipe, "text_encoder_2")
    known = {place.names[0]: place for tower in towers_of(pipe) for place in named_layers(tower, numbered)}
    for name in names:
        kind, params = lycoris.get_module(tensors, name)
        base = layer(pipe, known[name])
        if kind is ALGOS["ia3"]:  # its own reader takes one tensor of two
            module: Any = kind(name, base, 1.0, train_on_input=bool(params[1]))
            module.weight.data.copy_(params[0])
        elif (m := tensors.get(f"{name}.dora_scale")) is not None and len(m) == 1:  # its reader has no wd_on_output=False
            module = lycoris.make_module(kind, (*params[:-1], None), name, base)
            module.wd, module.wd_on_out, module.dora_scale = True, False, nn.Parameter(m)
        else:
            module = lycoris.make_module(kind, params, name, base)
        found |= by_site(known[name], change(module))
    return found


def changes(attached: veneer.Attachment | Sequence[veneer.Attachment]) -> dict[str, Tensor]:
    """W' − W of every site, in float64, by the adapters' weight form on the base's weights."""
    found: dict[str, Tensor] = {}
    for attachment in [attached] if isinstance(attached, veneer.Attachment) else attached:
        for name, (site, adapter) in attachment.parts.items():
            host: Any = adapter.__dict__.get("host")
            alone = copy.deepcopy(adapter, {id(host): host}).double()
            weight = base_tensor(attachment.towers[site.component], site.path, site.param).detach().double()
            weight = weight[slice(*(site.rows or (None,)))]
            with torch.no_grad():
                found[name] = alone.weight(weight) - weight
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Assert equality up to float32 rounding; sites without a change may be missing."""
    want = {name: delta for name, delta in want.items() if delta.abs().max() > 0}
    assert want.keys() <= got.keys()
    for name, delta in got.items():
        wanted = want.get(name, torch.zeros_like(delta))
        apart, size = (delta - wanted).abs().max().item(), wanted.abs().max().item()
        assert apart <= tolerance * max(size, 0.1), f"{name}: {apart:.3g} of {size:.3g}"
