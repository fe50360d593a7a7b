"""FLUX.2 klein: FLUX.2 with Qwen3 as its language model, and without guidance as an input."""

from __future__ import annotations

from typing import Any

from .flux2 import Flux2


class Flux2Klein(Flux2):
    """FLUX.2 with layers 9, 18 and 27 of Qwen3; the distilled models are those that generate without classifier-free guidance.

    Source: Black Forest Labs, flux2; diffusers `Flux2KleinPipeline`.
    """

    pipelines = ("Flux2KleinPipeline",)

    def prepare(self, prompts: list[str], tokenizer: Any) -> list[str]:
        """The prompts in the chat template, each as the message of a user, without a thinking block."""
        settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **settings) for prompt in prompts]
