"""One training step of a published model at full size with random weights, and its peak memory.

The denoiser is built on the meta device and gets its weights layer by layer. A layer is quantized before the next one gets its
weights, so that the float weights never exist at once. Text embeddings and latents are random, as if they came from the cache.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base_models.quantization import linear_layers
from veneer.base_models.quantized_linear import KINDS, quantize_linear
from veneer.training import attach_methods, prepare_base
from veneer.training.families import Family
from veneer.training.preflight.meta_family import meta_family

STATUS = Path("/proc/self/status")
PEAK = "5"
"""Written to `clear_refs`, it resets the peak resident memory of the process."""


@dataclass(frozen=True)
class FullSizeCase:
    """A training step of an architecture.

    Args:
        base: name of the architecture. `resolution`: side in pixels. `dtype`: of the base model.
        quantize: kind of the denoiser, or None. `gradient_checkpointing`: recompute activations.
        rank: of the LoRA on the default sites.
    """

    base: str
    resolution: int
    dtype: str = "bfloat16"
    quantize: str | None = None
    gradient_checkpointing: bool = False
    rank: int = 16


CASES: dict[str, FullSizeCase] = {
    "sd15-float32": FullSizeCase("sd15", 512, "float32"),
    "sd15-bfloat16": FullSizeCase("sd15", 512),
    "sdxl": FullSizeCase("sdxl", 1024, gradient_checkpointing=True),
    "sd35-int8": FullSizeCase("sd35", 512, quantize="int8"),
    "flux-nf4": FullSizeCase("flux", 256, quantize="nf4", gradient_checkpointing=True),
}
"""Name to case."""


@dataclass(frozen=True)
class FullSizeResult:
    """Measured memory and time of a case.

    Args:
        building, step: peak resident bytes above those before, while the model is built and in a training step.
        weights: resident bytes of the model and its adapters once built.
        build_seconds, seconds: time of building and of the step. `loss`: of the step, which is finite.
    """

    building: int
    weights: int
    step: int
    build_seconds: float
    seconds: float
    loss: float


def run_case(case: FullSizeCase, seed: int = 0) -> FullSizeResult:
    """Builds the model and runs two optimizer steps, of which the first has no forward pass and creates the optimizer's state.

    Call it in a new process: it measures the memory of the process, which libraries do not always return.
    """
    kind = meta_family(case.base, getattr(torch, case.dtype))
    torch.manual_seed(seed)
    before, start = _resident(), time.perf_counter()
    _reset_peak()
    materialize(kind.tower, case.quantize)
    method = attach_methods.build_methods("lora", {"lora": {"rank": case.rank}}, "<toy>", "toy")
    attached = attach_methods.attach_all(kind.pipe, method, {}, False, seed)
    if case.gradient_checkpointing:
        prepare_base.enable_gradient_checkpointing(kind.tower)
    trainable = [p for attachment in attached for p in attachment.parameters() if p.requires_grad]
    last_good = [p.detach().clone() for p in trainable]  # as the trainer keeps
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    for p in trainable:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    built, building, middle = _resident(), _peak(), time.perf_counter()
    _reset_peak()
    loss = _loss(kind, case.resolution)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    end = time.perf_counter()
    del last_good
    return FullSizeResult(building - before, built - before, _peak() - before, middle - start, end - middle, float(loss.detach()))


def materialize(tower: nn.Module, kind: str | None = None) -> None:
    """Gives a model on the meta device random weights on the CPU, and quantizes it as `quantize_model` does, layer by layer.

    Args:
        kind: name of a kind, or None.
    """
    block = KINDS[kind].block if kind else 1
    quantized = {name for name in linear_layers(tower) if kind and _linear(tower, name).in_features % block == 0}
    for path in [path for path, _ in tower.named_modules()]:  # names only: a list of modules would keep the float weights alive
        _fill(tower.get_submodule(path))
        if kind and path in quantized:
            owner, _, child = path.rpartition(".")
            tower.get_submodule(owner)._modules[child] = quantize_linear(_linear(tower, path), KINDS[kind])


def _fill(module: nn.Module) -> None:
    """Random values for the tensors of a module itself."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(_random(parameter), False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = _random(buffer)


def _linear(tower: nn.Module, path: str) -> Any:
    return tower.get_submodule(path)


def _random(tensor: Tensor) -> Tensor:
    values = torch.empty_like(tensor, device="cpu")
    return values.uniform_(-0.02, 0.02) if values.is_floating_point() else values.zero_()


def _loss(kind: Family, resolution: int) -> Tensor:
    side = resolution // kind.vae_factor
    noisy = torch.randn(1, kind.latent_channels, side, side)
    text = {name: _random(shape) for name, shape in kind.text_shapes(1).items()}
    return kind.denoise(noisy, torch.full((1,), 500.0), text).float().square().mean()


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(entry: str) -> int:
    """Bytes of an entry of the process's status."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    STATUS.with_name("clear_refs").write_text(PEAK)
