"""Several adapters as one, a LoRA out of a fine-tuned model, and a LoRA at another rank; each with its error."""

from .changes import CombineError
from .combine import combine, resize
from .extract import extract
from .files import DTYPES, Content, form_of, free, is_mergeable, read_content, unite_tokens, write, write_all
from .keep import Keep, keep_of
from .making import Made, Outcome

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
