"""Merging of adapters into a LoRA, a mean or a composition, extraction of a LoRA from a fine-tuned model, and rank reduction."""

from .adapter_files import DTYPES, Content, common_format, is_mergeable, new_file, read_content, unite_tokens, write, write_all
from .combine import combine, resize
from .composed_file import NODES, compose_files
from .delta_weights import CombineError
from .domain_selection import Selection, select_adapters
from .extract import extract
from .lora_from_deltas import LoRAFactors, MergeResult
from .neuron_alignment import record_activations
from .parameter_average import average_files
from .rank_selection import RankSelection, rank_selection_of

__all__ = [
    "DTYPES",
    "NODES",
    "CombineError",
    "Content",
    "LoRAFactors",
    "MergeResult",
    "RankSelection",
    "Selection",
    "average_files",
    "combine",
    "common_format",
    "compose_files",
    "extract",
    "is_mergeable",
    "new_file",
    "rank_selection_of",
    "read_content",
    "record_activations",
    "resize",
    "select_adapters",
    "unite_tokens",
    "write",
    "write_all",
]
