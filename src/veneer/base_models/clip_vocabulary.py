"""CLIP's tokenizer without a download: its vocabulary is in the package open_clip."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

FILE = "bpe_simple_vocab_16e6.txt.gz"
SIZE = 49408


def clip_tokenizer() -> Any:
    """The `CLIPTokenizer` of Stable Diffusion, SD3 and FLUX; None if open_clip is not installed.

    Source: Radford et al. 2021: bytes, bytes that end a word, one piece per merge, and the two special tokens.
    """
    package = importlib.util.find_spec("open_clip")  # located, not imported, which takes seconds
    if package is None or not package.submodule_search_locations:
        return None
    from transformers import CLIPTokenizer

    alphabet = byte_alphabet()
    text = gzip.decompress((Path(package.submodule_search_locations[0]) / FILE).read_bytes()).decode()
    merges: Any = [tuple(line.split()) for line in text.split("\n")[1 : SIZE - 2 * len(alphabet) - 1]]
    pieces = [*alphabet, *(f"{c}</w>" for c in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, model_max_length=77)


def byte_alphabet() -> list[str]:
    """The 256 printable characters that represent bytes in a byte-level BPE.

    Source: Radford et al. 2019, byte-level BPE; printable Latin-1 characters represent themselves, the rest U+0100 upwards.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]
