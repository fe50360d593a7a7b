"""Tiny real tokenizers, built from a word list without downloads, of the classes that pipelines declare."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from veneer.base_models.clip_vocabulary import byte_alphabet

_TEXT = """
a an the of on in at with and photo picture painting drawing toy dog cat duck house car tree flower beach snow street
red green blue yellow black white small big left right top bottom background rendering good one my new
"""
WORDS = tuple(_TEXT.split())
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template of Qwen's tokenizers, without tools and system prompt."""


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


def qwen_tokenizer(*texts: str) -> Any:
    """A `Qwen2Tokenizer` with one token per word of `WORDS` and `texts`, and bytes for everything else.

    Args:
        texts: such as a chat template, whose words have tokens with and without a space before.
    """
    from transformers import Qwen2Tokenizer

    words = _words(texts)
    merges: Any = _merges([*("Ġ" + word for word in (*WORDS, *words)), *words])
    pieces = [*byte_alphabet(), *("".join(pair) for pair in merges), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    special = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, additional_special_tokens=special, chat_template=CHAT, model_max_length=2048
    )


def gemma_tokenizer(*texts: str) -> Any:
    """A `GemmaTokenizer` with one token per word of `WORDS` and `texts`, and single ASCII characters for everything else."""
    from transformers import GemmaTokenizer

    merges: Any = _merges("▁" + word for word in (*WORDS, *_words(texts)))
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, "▁", "\n", *map(chr, range(33, 127)), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, model_max_length=2048)


def _words(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(re.findall("[A-Za-z]+", " ".join(texts))))


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each word, from its first character to its last."""
    return list(dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word))))
