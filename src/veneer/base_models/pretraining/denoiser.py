"""The denoiser (UNet) and its text encoder, trained jointly from scratch on latents of composed scenes.

With a separately trained, frozen text encoder the UNet ignored the prompt. Here the prompt conditions the UNet twice: through
cross-attention, and pooled into the time embedding (`addition_embed_type="text"`), which scales and shifts every residual block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .autoencoder import LATENT, to_tensor
from .data.captions import LENGTH
from .data.icon_sets import Pixels
from .data.mixture import Mixture
from .muon import optimizers
from .training_loop import TrainingRun

TEXT_WIDTH = 128
WATCHED = (999, 850, 700, 500, 300, 100)


class Denoiser(nn.Module):
    """The UNet and the text encoder as one module, with one optimizer, EMA and checkpoint."""

    def __init__(self, vocabulary: int, bos: int, eos: int, widths: tuple[int, int, int] = (64, 112, 160)) -> None:
        super().__init__()
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=TEXT_WIDTH, hidden_act="gelu",
                bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
            )
        )  # fmt: skip
        self.unet: Any = UNet2DConditionModel(
            sample_size=16,
            in_channels=LATENT,
            out_channels=LATENT,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
            resnet_time_scale_shift="scale_shift",
            addition_embed_type="text",
            addition_embed_type_num_heads=4,
        )

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predicted v, (n, 16, 16, 16)."""
        v: Tensor = self.unet(noisy, t, self.text(ids).last_hidden_state).sample
        return v


def schedule() -> Any:
    """The scheduler that is saved with the pipeline: DDIM, v-prediction, zero terminal SNR, trailing timesteps.

    `steps_offset` has no effect with trailing timesteps, but Stable Diffusion pipelines warn at every load unless it is 1.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1,
    )  # fmt: skip


@torch.no_grad()
def encode(vae: Any, images: Callable[[int, int], Pixels], count: int, cache: Path | None = None) -> npt.NDArray[np.float16]:
    """Latents (count, 16, 16, 16) of `images(first, last)`; cached in the file `cache`."""
    if cache is not None and cache.is_file():
        return np.asarray(np.load(cache), np.float16)
    latents = np.empty((count, LATENT, 16, 16), np.float16)
    for i in range(0, count, 32):
        pixels = to_tensor(images(i, min(i + 32, count))).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents[i : i + 32] = vae.encode(pixels).latent_dist.mean.float().numpy()
    if cache is not None:
        np.save(cache, latents)
    return latents


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Ids (n, 24), padded and truncated as in Stable Diffusion pipelines."""
    padded = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return padded.input_ids


def noised(latents: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents and the target v = sqrt(alpha) noise - sqrt(1 - alpha) latents."""
    alpha = schedule().alphas_cumprod[t].view(-1, 1, 1, 1)
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    return signal * latents + sigma * noise, signal * noise - sigma * latents


def sample_timesteps(rng: np.random.Generator, n: int, high: float) -> Tensor:
    """Samples timesteps: a fraction `high` from 800..999, where only the prompt determines the image, the rest uniform."""
    uniform = rng.integers(0, 1000, n)
    return torch.from_numpy(np.where(rng.random(n) < high, rng.integers(800, 1000, n), uniform))


@torch.no_grad()
def v_errors(model: Denoiser, latents: Tensor, ids: Tensor) -> dict[str, float]:
    """Mean squared v-error at the validation timesteps, with fixed noise."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    errors = {}
    for time in WATCHED:
        t = torch.full((len(latents),), time)
        noisy, v = noised(latents, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, t, ids)
        errors[f"v{time}"] = round(float((predicted.float() - v).square().mean()), 4)
    return errors


@dataclass(frozen=True)
class TrainingPlan:
    """Training length and learning rates: constant up to `steps - decay`, then linear to zero. Raise `steps` to extend a run."""

    steps: int
    decay: int = 600
    batch: int = 64
    muon_lr: float = 2e-3
    adam_lr: float = 1e-3
    high: float = 0.35
    plain: float = 0.4
    ema: float = 0.998

    def rate(self, step: int) -> float:
        """Learning-rate factor at a step."""
        return min(1.0, (step + 1) / 100, max(0.0, (self.steps - step) / self.decay) if self.decay else 1.0)


def train(
    folder: Path,
    model: Denoiser,
    latents: npt.NDArray[np.float16],
    mixture: Mixture,
    tokenizer: CLIPTokenizer,
    watched: Mapping[str, tuple[Tensor, Tensor]],
    plan: TrainingPlan,
    every: int = 100,
) -> Denoiser:
    """Trains (or continues training) up to `plan.steps`; returns the model with its EMA weights.

    Args:
        latents: of the examples of the mixture, in their order.
        tokenizer: with the tokens of the mixture.
        watched: latents and token ids of validation images, by name; their v-errors are logged.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.unet.set_attn_processor(AttnProcessor())  # the fused kernel's backward takes a fifth of a step here
    run = TrainingRun(folder, model, optimizers(model, plan.muon_lr, plan.adam_lr), plan.rate, plan.ema)
    run.resume()

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((13, step))
        rows = mixture.draw(rng, plan.batch, plan.plain)
        ids = tokenize(tokenizer, [mixture.examples[row].caption(rng) for row in rows])
        clean = torch.from_numpy(latents[rows].astype(np.float32))
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        t = sample_timesteps(rng, plan.batch, plan.high)
        noisy, v = noised(clean, noise, t)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy.contiguous(memory_format=torch.channels_last), t, ids)
        return (predicted.float() - v).square().mean()

    averaged = Denoiser(*_marks(model), widths=tuple(model.unet.config.block_out_channels))

    def report(step: int) -> dict[str, float]:
        averaged.load_state_dict(run.averaged())
        errors = {name: v_errors(averaged, *pair) for name, pair in watched.items()}
        return {f"{name}{key}": value for name, found in errors.items() for key, value in found.items()}

    run.train(loss, plan.steps, every, report)
    model.load_state_dict(run.averaged())
    return model


def _marks(model: Denoiser) -> tuple[int, int, int]:
    config: Any = model.text.config
    return config.vocab_size, config.bos_token_id, config.eos_token_id
