"""Merging of adapters into a LoRA, extraction of a LoRA from a fine-tuned model, and rank reduction, with their errors."""

from .adapter_files import DTYPES, Content, common_format, is_mergeable, new_file, read_content, unite_tokens, write, write_all
from .combine import combine, resize
from .delta_weights import CombineError
from .extract import extract
from .lora_from_deltas import LoRAFactors, MergeResult
from .rank_selection import RankSelection, rank_selection_of

__all__ = [
    "DTYPES",
    "CombineError",
    "Content",
    "LoRAFactors",
    "MergeResult",
    "RankSelection",
    "combine",
    "common_format",
    "extract",
    "is_mergeable",
    "new_file",
    "rank_selection_of",
    "read_content",
    "resize",
    "unite_tokens",
    "write",
    "write_all",
]
