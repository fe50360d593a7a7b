"""Loss of a diffusion model on a photo dataset; all randomness is a function of (seed, step, sample)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..data.dataset import Example, PhotoDataset
from ..data.latent_cache import Cache, cache_key, encoder_digest, why_not_cached
from ..encoder_offload import restore_encoders
from ..families import Family
from ..loop.seeds import generator
from .consistency import squared_distance
from .forward_passes import ForwardPasses
from .losses import LossKind, MaskMean, huber_threshold, prior_preservation, sample_losses
from .noise import NoiseOptions, sample_noise
from .objectives import ObjectiveOptions


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss between prediction and target.

    Args:
        kind: `l2`, `huber` or `smooth_l1`; see `losses.sample_losses`. `huber_schedule`: c depends on the SNR, else it is 0.1.
        mask_mean, mask_floor: see `losses.sample_losses`.
        prior_weight: λ of the class images.
    """

    kind: LossKind = "l2"
    huber_schedule: bool = True
    mask_mean: MaskMean = "plain"
    mask_floor: float = 0.0
    prior_weight: float = 1.0


@dataclass
class DenoisingLoss:
    """The `loss_step` of a `Trainer`: mean over photos of w(t)·d(model(x_t, t, caption), target) + λ · mean over class images.

    Args:
        family: the pipeline's family. `dataset`: images and captions. `seed`: seed of noise, timesteps and latents.
        samples: photos in one optimizer step, over all processes and micro-batches.
        objective_options, noise, options: see their classes.
        cache: cache of latents and text embeddings; None recomputes both at each step.
        passes: runs the forward passes that the methods ask for.
    Text embeddings are cached only if no text encoder trains. Of latents, the mean and standard deviation of the posterior are
    cached, and a new sample is taken at each step.
    """

    family: Family
    dataset: PhotoDataset
    seed: int
    samples: int
    objective_options: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    noise: NoiseOptions = field(default_factory=NoiseOptions)
    options: LossOptions = field(default_factory=LossOptions)
    cache: Cache | None = None
    passes: ForwardPasses = field(default_factory=ForwardPasses)

    def __post_init__(self) -> None:
        self.objective = self.family.objective(self.objective_options)
        towers = self.family.text_towers
        self.text_trains = any(why_not_cached(tower) is not None for tower in towers.values())
        is_cached = self.cache is not None
        self._text_key = (
            cache_key(*map(encoder_digest, towers.values())) if is_cached and towers and not self.text_trains else None
        )
        self._vae_key = encoder_digest(self.family.pipe.vae) if is_cached else ""

    @property
    def caches_all(self) -> bool:
        """True if latents and text embeddings are cached and few, so that the encoders are seldom needed."""
        return self.cache is not None and self.dataset.cacheable and not self.text_trains and not self.dataset.varies_captions

    def fill_cache(self, steps: int) -> bool:
        """Encodes the photos, class images and captions of the first two epochs.

        Args:
            steps: of the run, the most that are encoded.
        Returns:
            True if they all fit into the cache.
        """
        epoch = -(-max(len(self.dataset), len(self.dataset.prior_photos)) // self.samples)
        planned = range(min(steps, 2 * epoch))
        self._encode_steps(planned)
        return self._encode_steps(planned) == 0

    def _encode_steps(self, steps: Sequence[int]) -> int:
        """Encodes the examples of some steps. Returns how many encodings were not in the cache."""
        assert self.cache is not None
        misses = self.cache.misses
        for step in steps:
            examples = self.dataset.examples(step, self.samples)
            for example in examples:
                self._latents(step, example)
            self._text([example.caption for example in examples])
        return self.cache.misses - misses

    def __call__(self, step: int, rows: Sequence[int]) -> Tensor:
        """The loss over the photos `rows` of the step and their class images."""
        examples = self.dataset.examples(step, self.samples, rows)
        losses = self.losses(step, examples)
        return prior_preservation(losses, torch.tensor([e.is_prior for e in examples]), self.options.prior_weight)

    def losses(self, step: int, examples: Sequence[Example], timesteps: Tensor | None = None) -> Tensor:
        """Loss of each example, (batch,).

        Args:
            timesteps: (batch,), as `Objective.sample_timesteps` returns them (default: sampled).
        """
        family, objective = self.family, self.objective
        latents = torch.cat([self._latents(step, e) for e in examples])
        draws = [sample_noise(x, self.noise, self._random(step, e, "noise")) for x, e in zip(latents, examples, strict=True)]
        noise, input_noise = torch.stack([d[0] for d in draws]), torch.stack([d[1] for d in draws])
        height, width = examples[0].pixels.shape[-2:]
        generators = [self._random(step, e, "timestep") for e in examples]
        t = objective.sample_timesteps(generators, family.tokens(height, width)) if timesteps is None else timesteps
        t = t.to(latents.device)
        noisy, captions = objective.add_noise(latents, input_noise, t), [e.caption for e in examples]

        def predict() -> Tensor:
            return family.denoise(noisy, objective.model_input(t), self._text(captions), [e.size for e in examples])

        prediction, extra = self.passes(step, predict, squared_distance)
        losses = sample_losses(
            prediction,
            objective.target(latents, noise, t),
            objective.weight(t),
            _masks(examples),
            kind=self.options.kind,
            huber_c=huber_threshold(objective.snr(t)) if self.options.huber_schedule else 0.1,
            mask_mean=self.options.mask_mean,
            mask_floor=self.options.mask_floor,
        )
        return losses if extra is None else losses + extra

    def _random(self, step: int, example: Example, what: str) -> torch.Generator:
        return generator(self.seed, what, step, example.index)

    def _latents(self, step: int, example: Example) -> Tensor:
        """(1, channels, height, width): a sample from the cached posterior."""

        def encode() -> dict[str, Tensor]:
            with restore_encoders(self.family.pipe), torch.autocast(self.family.device.type, enabled=False):
                mean, std = self.family.encode_images(example.pixels[None])
            return {"mean": mean, "std": std}

        if self.cache is None or not self.dataset.cacheable:
            posterior = encode()
        else:
            posterior = self.cache.get(cache_key("latents", example.key, self._vae_key, "float32"), encode)
        device = self.family.device
        return self.family.latents(
            posterior["mean"].to(device), posterior["std"].to(device), self._random(step, example, "latents")
        )

    def _text(self, captions: list[str]) -> dict[str, Tensor]:
        if self.text_trains or not self.family.text_towers:
            return self.family.encode_text(captions)
        if self._text_key is None or self.cache is None:
            return self._encode(captions)
        key, device = self._text_key, self.family.device
        keys = [cache_key("text", self.family.text_identity(caption), key) for caption in captions]
        rows = [self.cache.get(k, partial(self._encode, [c])) for k, c in zip(keys, captions, strict=True)]
        return {name: part.to(device) for name, part in self.family.join_text(rows).items()}

    def _encode(self, captions: list[str]) -> dict[str, Tensor]:
        """Encodes without autocast, so that cached embeddings do not depend on the precision of the run."""
        with torch.no_grad(), restore_encoders(self.family.pipe), torch.autocast(self.family.device.type, enabled=False):
            return self.family.encode_text(captions)


def _masks(examples: Sequence[Example]) -> Tensor | None:
    if all(e.mask is None for e in examples):
        return None
    return torch.stack([torch.ones_like(e.pixels[:1]) if e.mask is None else e.mask for e in examples])
