"""Several adapters as one, a LoRA out of a fine-tuned model, and a LoRA at another rank; each with its error."""

from .adapter_files import DTYPES, Content, form_of, free, is_mergeable, read_content, unite_tokens, write, write_all
from .combine import combine, resize
from .delta_weights import CombineError
from .extract import extract
from .lora_from_deltas import Made, Outcome
from .rank_selection import Keep, keep_of

__all__ = [
    "DTYPES",
    "CombineError",
    "Content",
    "Keep",
    "Made",
    "Outcome",
    "combine",
    "extract",
    "form_of",
    "free",
    "is_mergeable",
    "keep_of",
    "read_content",
    "resize",
    "unite_tokens",
    "write",
    "write_all",
]
