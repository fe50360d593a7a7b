"""What is in an adapter's file, and how it fits a base, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from veneer.formats import Look

from ..shared.html import facts, names, note, table

FORMATS = {
    "native": "veneer's own: holds everything",
    "kohya": "kohya: A1111, Forge, ComfyUI",
    "comfyui": "ComfyUI",
    "diffusers": "diffusers",
    "peft_folder": "peft: a folder, as a zip",
    "lycoris": "LyCORIS: LoHa, LoKr, OFT and others",
    "onetrainer": "OneTrainer",
    "xlabs": "XLabs: FLUX only",
    "embeddings": "token embeddings only",
}
"""Formats that can be written, and who reads them."""
EMPTY = (
    '<div class="empty"><p><strong>No adapter yet.</strong> An adapter is a small file that changes what a model makes, such as '
    "a LoRA.</p><p>Upload one (a <code>.safetensors</code> file), train one on the page <em>Teach</em>, or look at the "
    "example first.</p></div>"
)
NONE_CHOSEN = '<div class="empty"><p>Choose an adapter to see what is in it.</p></div>'


def described(found: Look, base: str | None) -> str:
    """The file: its facts, and a table of what it changes block by block. `base`: that it says it is for."""
    ranks = sorted({rank for block in found.blocks for rank in block.ranks})
    alphas = sorted({alpha for block in found.blocks for alpha in block.alphas})
    told: list[tuple[str, object]] = [
        ("Method", ", ".join(_unique(block.method for block in found.blocks)) or "unknown"),
        ("Format", found.format or "unknown"),
        *([("For models of", found.family)] if found.family else []),
        ("Trained on", (base or "the file does not say")[:200]),
        ("Rank", _span(ranks) or "none"),
        ("Alpha", _span(alphas) or "as the rank"),
        ("Layers changed", f"{sum(block.layers for block in found.blocks):,}"),
        ("Parameters", f"{sum(block.values for block in found.blocks):,} in {found.tensors:,} tensors"),
        ("Size", size(found.size)),
        ("Trigger tokens", ", ".join(word[:80] for word in found.words[:20]) or "none"),
    ]
    rows = [(b.name, b.method, b.layers, _span(b.ranks), _span(b.alphas), b.values) for b in found.blocks]
    head = ("Block", "Method", "Layers", "Rank", "Alpha", "Parameters")
    blocks = table("What it changes, by block of the model", head, rows) if rows else ""
    return facts(told) + blocks + names("Entries of the header", found.header)


def fitting(found: Look, base: str) -> str:
    """How a file fits a base: what of it is used, unused, missing or of another shape."""
    if found.fits:
        said = note(f"It fits {base}: all of its {len(found.used):,} tensors are used.", "good")
    elif found.used:
        said = note(f"It fits {base} in part: {len(found.used):,} tensors are used. What does not fit is below.", "bad")
    else:
        said = note(f"It does not fit {base}. Choose the base that it was trained on.", "bad")
    lists = [
        names("Unused: in the file, with no place in the base", found.unused),
        names("Missing: the adapter needs it, and the file lacks it", found.missing),
        names("Of another shape than the base has", found.misshapen),
    ]
    return said + "".join(note(text[:1000]) for text in found.notes[:8]) + "".join(lists)


def size(count: int) -> str:
    """Bytes for people."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def _span(values: Sequence[float]) -> str:
    told = [f"{value:.4g}" for value in values]
    return "" if not told else told[0] if len(told) == 1 else f"{told[0]} to {told[-1]}"


def _unique(found: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(found))
