"""Estimates of memory, time and disk space of a run, from a measured step or from shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from veneer.injection.quantized_weight import plain_tensors
from veneer.injection.sharded_tensor import is_sharded

from ..encoder_offload import offloaded_modules
from ..loop.config import TrainConfig
from ..loop.optimizer_step import AUTOCAST
from ..report.progress import clock
from .memory_parts import count_training_step, passes_of, phase_peaks, training_bytes, vae_bytes
from .optimizer_state import state_bytes
from .step_cost import StepCost, flops_per_second, measure_step_cost, nbytes

if TYPE_CHECKING:
    from veneer.injection.attachment.attachment import Attachment

    from ..families import Family
    from ..report.previews import PreviewSettings


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a run, per process.

    Args:
        base: bytes of the weights on the device, including adapters; of a sharded base model, of the part on this process.
        offloaded: bytes of encoders that are on the CPU, and return for previews and evaluation.
        training: bytes of gradients, optimizer state, EMA weights and the copy of the last good weights.
        activations: peak bytes of the forward and backward pass of a micro-batch, beyond the gradients of the adapters.
        encoding, decoding: peak bytes of the VAE's pass for a photo and, with previews or evaluation, for an image.
        checkpoint: bytes of one checkpoint.
        seconds: seconds of one optimizer step. `steps`: steps of the run.
        measured: True if `seconds` and `activations` are measured in a warm step, False if estimated from shapes.
        device: device of the run.
        images: number of images for previews and evaluation. `image_seconds`: seconds of one image.
        loading: seconds from the start of the run to the estimate.
        written: bytes that the run writes to the disk.
    """

    base: int
    training: int
    activations: int
    checkpoint: int
    seconds: float
    steps: int
    measured: bool
    device: str
    images: int = 0
    image_seconds: float = 0.0
    loading: float = 0.0
    written: int = 0
    offloaded: int = 0
    encoding: int = 0
    decoding: int = 0

    @property
    def total_seconds(self) -> float:
        """Seconds of the run: loading, training, previews and evaluation."""
        return self.loading + self.seconds * self.steps + self.image_seconds * self.images

    @property
    def memory(self) -> int:
        """Peak bytes of all tensors on the device, in training or generation, without the process and its libraries."""
        parts = self.training, self.activations, self.encoding, self.decoding
        return max(phase_peaks(self.base, self.offloaded, *parts, offloads=self.offloaded > 0).values())

    def __str__(self) -> str:
        parts = f"base {size(self.base)}, training {size(self.training)}, activations {size(self.activations)}"
        how = "measured in a warm step" if self.measured else "a lower bound, estimated from shapes"
        return (
            f"time about {clock(self.total_seconds)} on {self.device}: loading {clock(self.loading)}, {self.steps} steps × "
            f"{self.seconds:.3g} s = {clock(self.seconds * self.steps)}, {self.images} images of previews and evaluation × "
            f"{self.image_seconds:.3g} s = {clock(self.image_seconds * self.images)}; memory about {size(self.memory)} "
            f"({parts}); disk about {size(self.written)}, a checkpoint {size(self.checkpoint)}; {how}"
        )


def size(count: int) -> str:
    """Bytes as `1.25 GiB` or `12.5 MiB`."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def estimate(
    attachments: Sequence[Attachment],
    config: TrainConfig,
    family: Family,
    resolution: int,
    rows: int,
    samples: int,
    texts: Sequence[str],
    measure: bool,
    *,
    images: int = 0,
    previews: int = 0,
    sampling: PreviewSettings | None = None,
    loading: float = 0.0,
) -> Estimate:
    """Estimates the cost of a run. Weights, gradients and the random state are restored.

    Args:
        resolution: side in pixels. `rows`: images per micro-batch of one process, with class images. `samples`: images per
            optimizer step of one process. `texts`: prompts, of which the longest is encoded.
        measure: measure two passes of a micro-batch; if False, estimate from shapes and the speed of a matrix product.
        images, previews: number of images for evaluation and previews. `sampling`: their settings. `loading`: seconds so far.
    """
    trainable = [p for a in attachments for p in a.parameters() if p.requires_grad]
    device = trainable[0].device
    if measure:
        step = _step(family, resolution, rows, texts, config.mixed_precision)
        if any(map(is_sharded, family.tower.parameters())):
            with torch.no_grad():
                step()  # allocates the buffers of whole weights, which are empty except while a block runs
        cost = _undisturbed(lambda: measure_step_cost(step), trainable)
        seconds = cost.seconds or 0.0
        forward = cost.forward or seconds / 3
    else:
        cost = count_training_step(family, trainable, resolution, rows, config.mixed_precision)
        seconds = cost.flops / flops_per_second(device, AUTOCAST[config.mixed_precision] or torch.float32)
        forward = seconds / 3
    values, count = sum(p.numel() for p in trainable), passes_of(attachments)
    encoding, decoding = vae_bytes(family, resolution)
    passes = 0 if sampling is None else sampling.steps * (2 if sampling.guidance is None or sampling.guidance > 1 else 1)
    parts = [part for part in family.pipe.components.values() if isinstance(part, nn.Module)]
    return Estimate(
        base=nbytes(t for part in parts for _, t in plain_tensors(part) if t.device == device),
        training=training_bytes(values, config),
        activations=count * max(0, cost.activations - 4 * values),
        checkpoint=checkpoint_bytes(values, config),
        seconds=count * seconds * samples / rows,
        steps=config.steps,
        measured=measure,
        device=str(device),
        images=images + previews,
        image_seconds=forward / rows * passes,
        loading=loading,
        written=written_bytes(values, config, images + previews, resolution),
        encoding=encoding,
        decoding=decoding if images + previews else 0,
        offloaded=nbytes(t for part in offloaded_modules(family.pipe) for t in part.parameters()) if images + previews else 0,
    )


def checkpoint_bytes(values: int, config: TrainConfig) -> int:
    """Bytes of a checkpoint with `values` trainable parameters: weights, EMA weights and optimizer state."""
    return round(values * (state_bytes(config.optimizer) + 4 * (2 if config.ema else 1)))


def written_bytes(values: int, config: TrainConfig, images: int = 0, resolution: int = 0) -> int:
    """Bytes that a run writes: the adapter in two formats, checkpoints and the one being written, image grids (3 bytes per pixel,
    uncompressed, with at least 160 pixels per side) and logs.

    Args:
        values: number of trainable parameters. `images`: number of images for previews and evaluation, `resolution` pixels per
            side.
    """
    every = config.checkpoint_every
    count = config.steps // every if every else 0
    kept = min(count, config.keep_checkpoints) if config.keep_checkpoints else count
    grids = 3 * max(160, resolution) ** 2 * images
    return 2 * 4 * values + checkpoint_bytes(values, config) * (kept + 1 if every else 0) + grids + 2**20


def _step(family: Family, resolution: int, rows: int, texts: Sequence[str], precision: str) -> Callable[[], Tensor]:
    """The forward pass of a micro-batch with zero latents; text is encoded in it only if a text encoder trains."""
    text_trains = any(p.requires_grad for tower in family.text_towers.values() for p in tower.parameters())
    words = [max(texts, key=len)] * rows
    latent = resolution // family.vae_factor
    noisy = torch.zeros(rows, family.latent_channels, latent, latent, device=family.device)
    objective = family.objective()
    draws = [torch.Generator().manual_seed(row) for row in range(rows)]
    times = objective.model_input(objective.sample_timesteps(draws, family.tokens(resolution, resolution)).to(noisy.device))
    dtype = AUTOCAST[precision]

    def encode() -> dict[str, Tensor]:
        with torch.set_grad_enabled(text_trains and torch.is_grad_enabled()):
            return family.encode_text(words)

    with torch.no_grad():
        kept = {name: each.to(noisy.device) for name, each in encode().items()}

    def step() -> Tensor:
        with torch.autocast(noisy.device.type, dtype, enabled=dtype is not None):
            return family.denoise(noisy, times, encode() if text_trains else kept).float().square().mean()

    return step


def _undisturbed(action: Callable[[], StepCost], trainable: Sequence[Tensor]) -> StepCost:
    """Runs `action`, and restores gradients and the random state."""
    gradients = [p.grad for p in trainable]
    devices = {p.device for p in trainable if p.device.type == "cuda"}
    try:
        for p in trainable:
            p.grad = None
        with torch.random.fork_rng(devices=devices):
            return action()
    finally:
        for p, gradient in zip(trainable, gradients, strict=True):
            p.grad = gradient
