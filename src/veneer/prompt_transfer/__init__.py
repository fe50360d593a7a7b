"""Which trained prompts suit another task: similarities of the prompts, and of the neurons that they activate."""

from .neurons import activated_neurons, neuron_overlap
from .similarity import average_similarity, token_similarity
from .stored_prompts import StoredPromptError, read_prompts

__all__ = ["StoredPromptError", "activated_neurons", "average_similarity", "neuron_overlap", "read_prompts", "token_similarity"]
