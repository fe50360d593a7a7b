"""FLUX.2: a flow transformer over normalized 2×2 patches of latents, and several layers of a language model as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...objective.objectives import Flow, Objective, ObjectiveOptions
from ..family import Sizes
from ..pipeline_resolution import call_default
from ..prompt_limits import LanguageModelLimits
from .flux import Flux, pack, positions, unpack


class Flux2(LanguageModelLimits, Flux):
    """ε − x₀ = unpack(transformer(pack(x_σ), σ, guidance, text, positions)).

    A latent is (z − μ)/√(var + ε) with the running statistics of the VAE's batch norm, one for each channel and place in a 2×2
    patch. Text is what layers 10, 20 and 30 of the language model return for the system message and the prompt, one after the
    other in each token. `guidance` is an input of the guidance-distilled model (`guidance_embeds` in the config).
    Source: Black Forest Labs, flux2; diffusers `Flux2Pipeline`.
    """

    pipelines = ("Flux2Pipeline",)
    needs = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")

    def objective(self, options: ObjectiveOptions | None = None) -> Objective:
        """μ of `flux_shift` is that of the pipeline at its default number of steps, linear in the number of tokens up to 4300."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        objective = super().objective(options)
        if isinstance(objective, Flow):
            steps = call_default(type(self.pipe), "num_inference_steps")
            low, high = (compute_empirical_mu(tokens, steps) for tokens in (256, 4096))
            objective.mu = (low, high, 256, 4096)
        return objective

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        return normalize_patches(vae, *super().encode_images(pixels), float(vae.config.batch_norm_eps))

    def encode_text(self, prompts: list[str]) -> dict[str, Tensor]:
        """`prompt_embeds` (batch, tokens, layers·width)."""
        self.check_length(prompts)
        embeds, _ = self.pipe.encode_prompt(prompts, device=self.text_device, max_sequence_length=self.text_tokens)
        return {"prompt_embeds": embeds}

    def text_shapes(self, rows: int) -> dict[str, Tensor]:
        width, dtype = self.config.joint_attention_dim, self.pipe.text_encoder.dtype
        return {"prompt_embeds": torch.empty(rows, self.text_tokens, width, dtype=dtype, device="meta")}

    def limits(self) -> Iterator[tuple[Any, int]]:
        processor = self.pipe.tokenizer
        yield getattr(processor, "tokenizer", processor), self.text_tokens

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        """The prompts in the chat template, with the system message, and without a start token that the tokenizer adds."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input(prompts, system_message=self.pipe.system_message)
        texts = self.pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
        added = tokenizer.decode(tokenizer("").input_ids[:1])
        return [text.removeprefix(added) for text in texts]

    def guidance_input(self, rows: int, device: torch.device) -> Tensor | None:
        """`guidance` for each row, (batch,); None if the model has no such input."""
        return torch.full((rows,), self.guidance, device=device) if self.config.guidance_embeds else None

    def denoise(self, noisy: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Sizes | None = None) -> Tensor:
        (height, width), embeds = noisy.shape[-2:], self.cast(text["prompt_embeds"])
        text_places = F.pad(torch.arange(embeds.shape[1])[:, None], (3, 0))
        image_places = F.pad(positions(height // 2, width // 2), (0, 1))
        output = self.tower(
            hidden_states=pack(self.cast(noisy)),
            timestep=self.cast(timesteps) / 1000,
            guidance=self.guidance_input(len(noisy), noisy.device),
            encoder_hidden_states=embeds,
            txt_ids=text_places.to(noisy.device).expand(len(noisy), -1, -1),
            img_ids=image_places.to(noisy.device).expand(len(noisy), -1, -1),
            return_dict=False,
        )[0]
        return unpack(output, height, width)


def normalize_patches(vae: Any, mean: Tensor, std: Tensor, eps: float, places_first: bool = False) -> tuple[Tensor, Tensor]:
    """(mean, std) of latents normalized by the VAE's batch norm, which has a channel for each place in a 2×2 patch.

    Args:
        places_first: the channels of the batch norm are ordered by row, column and channel, not by channel, row and column.
    """
    height, width = mean.shape[-2:]
    shift, scale = vae.bn.running_mean.float(), (vae.bn.running_var.float() + eps).rsqrt()
    shift, scale = (
        (part.view(2, 2, -1).permute(2, 0, 1) if places_first else part.view(-1, 2, 2)).repeat(1, height // 2, width // 2)
        for part in (shift, scale)
    )
    return (mean - shift) * scale, std * scale
