"""Tiny real tokenizers, built from a word list without downloads, of the classes that pipelines declare."""

from __future__ import annotations

from typing import Any

from veneer.base_models.clip_vocabulary import byte_alphabet

_TEXT = """
a an the of on in at with and photo picture painting drawing toy dog cat duck house car tree flower beach snow street
red green blue yellow black white small big left right top bottom background rendering good one my new
"""
WORDS = tuple(_TEXT.split())


def clip_tokenizer(length: int = 77, pad: str = "<|endoftext|>") -> Any:
    """A `CLIPTokenizer` with one token per word of `WORDS`, and bytes for everything else.

    Args:
        length: `model_max_length`, in tokens, including start and end.
        pad: the padding token; SD 1.x pads with the end-of-text token, SD 2 and SDXL's second tokenizer with `!`.
    The end-of-text token has the largest id, as CLIP's pooling expects.
    """
    from transformers import CLIPTokenizer

    alphabet = byte_alphabet()
    pieces: dict[str, None] = dict.fromkeys(alphabet + [c + "</w>" for c in alphabet])
    merges: dict[Any, None] = {}  # pairs; a dict preserves their order
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[(parts[0], parts[1])] = None
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces[parts[0]] = None
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), pad_token=pad, model_max_length=length)


def t5_tokenizer(length: int = 512) -> Any:
    """A `T5Tokenizer` with one unigram per word of `WORDS`, and single ASCII characters for everything else."""
    from transformers import T5Tokenizer

    words = [("▁" + word, -3.0) for word in WORDS]
    characters = [(chr(c), -9.0) for c in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -6.0), *words, *characters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)
