"""Time to load a LoRA file for every linear layer, in diffusers' and in kohya's layout, into a FLUX transformer without memory.

Every weight of the transformer is a scalar expanded to its shape, so that only the loading takes time. Half-precision files
become float32 adapters; the reference is therefore safetensors' reading with the same conversion.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer.formats import load
from veneer.formats._names.kohya import named_layers
from veneer.formats._names.modules import weight_paths
from veneer.injection.towers import towers_of

from . import peers
from .interleaved_timing import Contender, Contest
from .shapes import Shape, flux


def contests(shape: Shape, rank: int, scratch: Path) -> list[Contest]:
    """One contest per layout; each timing uses a new model, built before the clock starts.

    Args:
        scratch: folder for the files.
    """
    fresh = partial(weightless, shape.flux)
    files = {"diffusers": _diffusers(fresh(), rank, scratch), "kohya": _kohya(fresh(), rank, scratch)}
    made = []
    for layout, (path, layers) in files.items():
        ways = [
            Contender("veneer", partial(_by_veneer, path), fresh),
            Contender("safetensors", partial(_by_safetensors, path)),
        ]
        pairs = [("veneer", "safetensors")]
        if layout == "diffusers" and peers.has_peft():
            ways.append(Contender("diffusers", partial(_by_diffusers, path), fresh))
            pairs.append(("veneer", "diffusers"))
        size = path.stat().st_size / 1e6
        what = f"LoRA of rank {rank} for {layers} layers of a FLUX transformer, {size:.0f} MB in the layout of {layout}"
        made.append(Contest(f"load, {layout}", what, tuple(ways), tuple(pairs)))
    return made


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, in float32."""
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def weightless(config: dict[str, Any]) -> nn.Module:
    """A FLUX transformer in bfloat16 on the CPU, each parameter a scalar expanded to its shape."""
    model = flux(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            expanded = torch.zeros((), dtype=torch.bfloat16).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(expanded, requires_grad=False))
    return model.eval()


def _diffusers(model: nn.Module, rank: int, scratch: Path) -> tuple[Path, int]:
    (tower,) = towers_of(model)
    state: dict[str, Tensor] = {}
    for path, site in weight_paths(tower).items():
        state[f"transformer.{path}.lora_A.weight"] = _random(rank, site.d_in)
        state[f"transformer.{path}.lora_B.weight"] = _random(site.d_out, rank)
    save_file(state, scratch / "diffusers.safetensors")
    return scratch / "diffusers.safetensors", len(state) // 2


def _kohya(model: nn.Module, rank: int, scratch: Path) -> tuple[Path, int]:
    """One LoRA pair for each fused projection, as sd-scripts trains it."""
    (tower,) = towers_of(model)
    state: dict[str, Tensor] = {}
    found = named_layers(tower)
    for place in found:
        name, rows = place.names[0], sum(site.d_out for site in place.sites)
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = (
            _random(rank, place.sites[0].d_in),
            _random(rows, rank),
        )
        state[f"{name}.alpha"] = torch.tensor(float(rank))
    save_file(state, scratch / "kohya.safetensors")
    return scratch / "kohya.safetensors", len(found)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def _by_veneer(path: Path, model: Any) -> Any:
    return load(model, path)


def _by_safetensors(path: Path, _: object) -> object:
    return read(path)


def _by_diffusers(path: Path, model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_lora_adapter(load_file(path), prefix="transformer")
