"""CLIP's tokenizer without a download: its vocabulary is in the package open_clip."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path
from typing import Any

FILE = "bpe_simple_vocab_16e6.txt.gz"
SIZE = 49408


class DeferredTokenizer:
    """The `CLIPTokenizer` of Stable Diffusion, SD3 and FLUX, built on first use: importing transformers takes a second."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._tokenizer_of_clip, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tokenizer_of_clip, name, value)

    def __len__(self) -> int:
        return len(self._tokenizer_of_clip)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer_of_clip(*args, **options)

    @functools.cached_property
    def _tokenizer_of_clip(self) -> Any:
        return clip_tokenizer()


def has_vocabulary() -> bool:
    """True if open_clip, which has the vocabulary, and transformers are installed."""
    return _vocabulary_file() is not None and importlib.util.find_spec("transformers") is not None


def clip_tokenizer() -> Any:
    """The `CLIPTokenizer` of Stable Diffusion, SD3 and FLUX; None if open_clip is not installed.

    Source: Radford et al. 2021: bytes, bytes that end a word, one piece per merge, and the two special tokens.
    """
    file = _vocabulary_file()
    if file is None:
        return None
    from transformers import CLIPTokenizer

    alphabet = byte_alphabet()
    text = gzip.decompress(file.read_bytes()).decode()
    merges: Any = [tuple(line.split()) for line in text.split("\n")[1 : SIZE - 2 * len(alphabet) - 1]]
    pieces = [*alphabet, *(f"{c}</w>" for c in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, model_max_length=77)


def _vocabulary_file() -> Path | None:
    package = importlib.util.find_spec("open_clip")  # located, not imported, which takes seconds
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / FILE


def byte_alphabet() -> list[str]:
    """The 256 printable characters that represent bytes in a byte-level BPE.

    Source: Radford et al. 2019, byte-level BPE; printable Latin-1 characters represent themselves, the rest U+0100 upwards.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]
