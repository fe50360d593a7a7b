"""Trained prompts for other tasks and models: similarities, activated neurons, and a projector to another model."""

from .model_transfer import ProjectorOptions, models_of, prompt_of, transfer_to_model
from .neurons import activated_neurons, neuron_overlap
from .projector import PromptProjector, squared_distance
from .projector_training import minimize_distance, set_prompt, tune_on_task
from .prompt_library import average_prompts, read_library, write_prompt
from .similarity import average_similarity, token_similarity
from .stored_prompts import SoftPrompt, StoredPromptError, model_identity, read_prompts, read_soft_prompt

__all__ = [
    "ProjectorOptions",
    "PromptProjector",
    "SoftPrompt",
    "StoredPromptError",
    "activated_neurons",
    "average_prompts",
    "average_similarity",
    "minimize_distance",
    "model_identity",
    "models_of",
    "neuron_overlap",
    "prompt_of",
    "read_library",
    "read_prompts",
    "read_soft_prompt",
    "set_prompt",
    "squared_distance",
    "token_similarity",
    "transfer_to_model",
    "tune_on_task",
    "write_prompt",
]
