"""Parts of the memory of a run from shapes: what training adds to the weights, activations of a step, and the VAE's passes.

The estimate of a loaded run and the prediction for a base model without weights are both sums of these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from veneer.injection import Attachment
from veneer.injection.errors import BaseModelError

from ..families import Family
from ..loop.config import TrainConfig
from ..loop.optimizer_step import AUTOCAST
from .optimizer_state import state_bytes
from .step_cost import StepCost, count_forward_bytes, count_step_cost


def training_bytes(values: int, config: TrainConfig) -> int:
    """Bytes of float32 gradients, optimizer state, EMA weights and the copy of the last good weights and EMA weights.

    Args:
        values: number of trainable parameters.
    """
    copies = 4 * (2 if config.ema else 1)
    return round(values * (4 + state_bytes(config.optimizer) + copies + (4 if config.ema else 0)))


def phase_peaks(
    resident: int, encoders: int, training: int, activations: int, encoding: int, decoding: int, offloads: bool
) -> dict[str, int]:
    """Peak bytes of each phase of a run.

    Args:
        resident: weights of the denoiser and adapters. `encoders`: weights of VAE and text encoders.
        training: see `training_bytes`. `activations`: of a step beyond its gradients.
        encoding, decoding: what the VAE allocates for a photo and for an image.
        offloads: whether the encoders leave the device once their outputs are cached, and return to generate images.
    """
    kept = 0 if offloads else encoders
    return {
        "loading": resident + encoders,
        "caching": resident + encoders + encoding if offloads else 0,
        "training": resident + kept + training + max(activations, 0 if offloads else encoding),
        "generating": resident + encoders + training + decoding,
    }


def passes_of(attachments: Sequence[Attachment]) -> int:
    """Forward passes of a batch before its backward pass, whose activations are in memory together."""
    return max((a.method.passes for a in attachments), default=1)


def count_training_step(
    family: Family, trainable: Iterable[Tensor], resolution: int, rows: int, precision: str, flops: bool = True
) -> StepCost:
    """Cost of a micro-batch from shapes, with the passes of text encoders that train.

    Args:
        trainable: trainable parameters. `resolution`: side in pixels. `rows`: images. `precision`: autocast dtype, as in
            `mixed_precision`.
        flops: count them too, which takes longer than the bytes.
    Raises:
        BaseModelError: shapes in the denoiser depend on values, as in a mixture of experts.
    """
    trainable = list(trainable)
    dtype = AUTOCAST[precision]
    latent = resolution // family.vae_factor
    noisy = torch.empty(rows, family.latent_channels, latent, latent, device=family.device)
    text = {name: torch.ones_like(shape, device=family.device) for name, shape in family.text_shapes(rows).items()}
    times = torch.full((rows,), 1000.0, device=family.device)
    inputs = catch_inputs(family.tower, lambda: family.denoise(noisy, times, text))
    try:
        costs = [count_step_cost(family.tower, inputs, trainable, dtype, flops)]
    except DynamicOutputShapeException as error:
        kind = type(family.tower).__name__
        message = (
            f"the memory of {kind} cannot be counted without weights: the number of tokens of each expert depends on them; "
            "leave out the check, and begin with a small batch and resolution."
        )
        raise BaseModelError(message, where="memory", given=kind) from error
    for tower in family.text_towers.values():
        if any(p.requires_grad for p in tower.parameters()):
            limit = getattr(tower.config, "max_position_embeddings", None) or family.text_tokens
            ids = torch.zeros(rows, int(limit), dtype=torch.int64, device="meta")
            costs.append(count_step_cost(tower, {"input_ids": ids}, trainable, dtype, flops))
    return StepCost(sum(cost.activations for cost in costs), sum(cost.flops for cost in costs))


def vae_bytes(family: Family, resolution: int) -> tuple[int, int]:
    """What the VAE allocates while it encodes one photo and decodes one image; a float16 VAE with `force_upcast` uses float32.

    Counted once per process for VAEs of one architecture, dtype and device.
    """
    vae = family.pipe.vae
    factor = 2 if vae.dtype == torch.float16 and vae.config.get("force_upcast", False) else 1
    key = (type(family), resolution, *_layout(vae))
    if key not in _vae_counts:
        _vae_counts[key] = _count_vae_bytes(family, resolution)
    encoding, decoding = _vae_counts[key]
    return factor * encoding, factor * decoding


_vae_counts: dict[tuple[Any, ...], tuple[int, int]] = {}


def _layout(vae: Any) -> tuple[Any, ...]:
    """All that a pass of a VAE depends on for its shapes, such as its config, dtypes and slicing, but not its weights."""
    config = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}  # such as its path
    settings = {name: value for name, value in vars(vae).items() if isinstance(value, (bool, int))}
    tensors = [(tuple(t.shape), t.dtype, t.device.type) for t in (*vae.parameters(), *vae.buffers())]
    return type(vae), repr(config), repr(settings), *tensors


def _count_vae_bytes(family: Family, resolution: int) -> tuple[int, int]:
    vae, side = family.pipe.vae, resolution // family.vae_factor
    photo = torch.empty(1, 3, resolution, resolution, dtype=vae.dtype, device="meta")
    latents = torch.empty(1, family.latent_channels, side, side, dtype=vae.dtype, device="meta")
    encoding = count_forward_bytes(vae, {"x": family.with_frame(photo)}, "encode")
    return encoding, count_forward_bytes(vae, {"z": family.with_frame(latents)}, "decode")


class _Caught(Exception):
    pass


def catch_inputs(tower: nn.Module, step: Callable[[], object]) -> Mapping[str, Any]:
    """The arguments by name of the denoiser call in a step; the denoiser does not run."""
    caught: dict[str, Any] = {}

    def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.update(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        raise _Caught

    handle = tower.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        step()
    except _Caught:
        pass
    finally:
        handle.remove()
    return caught
