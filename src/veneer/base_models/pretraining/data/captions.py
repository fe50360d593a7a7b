"""Captions for scenes, and the small BPE tokenizer trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .scenes import COLORS, PLACES, SIZES, Scene

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

LENGTH = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LEADS = ("a picture of", "an icon of", "a drawing of")
PHOTO_LEADS = ("a picture of", "a photo of", "a photo of", "a photo of")
MODEL_LEADS = ("a picture of", "a rendering of")


def article(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def full_caption(word: str, scene: Scene, style: str) -> str:
    """The caption with all attributes: "a small apple, top left, green background, flat style"."""
    return f"{article(f'{scene.size} {word}')}, {scene.place}, {scene.background} background, {style} style"


def caption(rng: np.random.Generator, word: str, scene: Scene, style: str) -> str:
    """Samples a caption with some attributes of the scene; one in ten is empty, for classifier-free guidance.

    Size and place are omitted mostly if they have their default values (large, center), so that a prompt without them means a
    large thing in the center. Background and style are omitted at random.
    """
    if rng.random() < 0.1:
        return ""
    says = {"size": True, "place": True, "background": True, "style": bool(style)}
    if rng.random() < 0.5:
        usual = {"size": scene.size == "large", "place": scene.place == "center"}
        says = {part: says[part] and rng.random() > (0.6 if usual.get(part, True) else 0.08) for part in says}
    thing = article(f"{scene.size} {word}" if says["size"] else word)
    leads = {"photo": PHOTO_LEADS, "3d": MODEL_LEADS}.get(style, LEADS)
    if rng.random() < (0.4 if style == "photo" else 0.15):
        thing = f"{leads[rng.integers(len(leads))]} {thing}"
    tail = [scene.place] * says["place"] + [f"{scene.background} background"] * says["background"]
    tail += [f"{style} style"] * says["style"]
    if rng.random() < 0.15:
        rng.shuffle(tail)
    return ", ".join([thing, *tail])


def photo_caption(rng: np.random.Generator, word: str) -> str:
    """Samples a caption of a photo without a known scene; one in ten is empty."""
    chance = rng.random()
    if chance < 0.1:
        return ""
    thing = article(word)
    if chance < 0.7:
        return f"a photo of {thing}"
    return f"{thing}, photo style" if chance < 0.85 else thing


def corpus(modules: Path, words: list[str], styles: list[str]) -> Iterator[str]:
    """Text for the tokenizer: captions of every word, and the names and keywords of all emoji for general English."""
    rng = np.random.default_rng(0)
    for word in words:
        for _ in range(60):
            size, place, color = (str(rng.choice(list(kind))) for kind in (SIZES, PLACES, COLORS))
            yield full_caption(word, Scene(0, size, place, color), str(rng.choice(styles)))
            yield f"{LEADS[rng.integers(len(LEADS))]} {article(word)}"
    yield from (f"a photo of {article(word)}, on the beach, in the snow, on a table" for word in ("toy", "dog") * 60)
    for record in json.loads((modules / "emojilib" / "dist" / "emoji-en-US.json").read_text()).values():
        yield " ".join(str(keyword).replace("_", " ") for keyword in record)


def train_tokenizer(text: Iterator[str], folder: Path, size: int = 2400) -> CLIPTokenizer:
    """Trains a byte-level BPE like CLIP's and saves it in the transformers layout.

    The end token has the largest id (open_clip pools at the largest id) and is the padding token too, as in Stable Diffusion 1.x.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(_pattern(), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=4
    )
    bpe.train_from_iterator(text, trainer)
    model: dict[str, Any] = json.loads(bpe.to_str())["model"]
    vocab, merges = _ordered(sorted(alphabet), [tuple(m) for m in model["merges"]])
    pairs: Any = merges
    tokenizer = CLIPTokenizer(vocab, pairs, bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=EOS, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer


def _ordered(alphabet: list[str], merges: list[tuple[str, str]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's order of the vocabulary: bytes, bytes at the end of words, merges, the two special tokens."""
    entries = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges), BOS, EOS]
    return {entry: i for i, entry in enumerate(dict.fromkeys(entries))}, merges


def _pattern() -> Any:
    from tokenizers import Regex

    return Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
