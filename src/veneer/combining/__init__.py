"""Several adapters as one, a LoRA out of a fine-tuned model, and a LoRA at another rank; each with its error."""

from .changes import CombineError
from .combine import combine, resize
from .extract import extract
from .files import DTYPES, form_of, free, read_one, write
from .keep import Keep, keep_of
from .making import Made, Outcome

__all__ = [
    "DTYPES",
    "CombineError",
    "Keep",
    "Made",
    "Outcome",
    "combine",
    "extract",
    "form_of",
    "free",
    "keep_of",
    "read_one",
    "resize",
    "write",
]
