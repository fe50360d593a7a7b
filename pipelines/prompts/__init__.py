"""Compare trained prompts, and transfer them to another task or another model."""

from .similarity import PromptSimilarityConfig, prompt_similarity
from .spot import SpotConfig, spot
from .transfer import PromptTransferConfig, transfer_prompt

__all__ = ["PromptSimilarityConfig", "PromptTransferConfig", "SpotConfig", "prompt_similarity", "spot", "transfer_prompt"]
