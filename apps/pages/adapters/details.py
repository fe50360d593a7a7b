"""HTML descriptions of an adapter file and of its compatibility with a base model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from veneer.formats import FileSummary

from ..shared.html import facts, name_list, note, table

FORMATS = {
    "native": "veneer: all methods and settings",
    "kohya": "kohya: A1111, Forge, ComfyUI",
    "comfyui": "ComfyUI",
    "diffusers": "diffusers",
    "peft_folder": "peft: a folder, as a zip",
    "lycoris": "LyCORIS: LoHa, LoKr, OFT and others",
    "onetrainer": "OneTrainer",
    "xlabs": "XLabs: FLUX only",
    "embeddings": "token embeddings only",
}
"""Writable formats and the tools that read them."""
EMPTY = (
    '<div class="empty"><p><strong>No adapter yet.</strong> An adapter is a small file of trained parameters for a base model, '
    "such as a LoRA.</p><p>Upload one (a <code>.safetensors</code> file), train one on the page <em>Train</em>, or use the "
    "example.</p></div>"
)
NONE_CHOSEN = '<div class="empty"><p>Choose an adapter to see what is in it.</p></div>'


def describe_file(found: FileSummary, base: str | None) -> str:
    """Properties of a file, and a table by block of the model. `base`: the base model that the file states."""
    ranks = sorted({rank for block in found.blocks for rank in block.ranks})
    alphas = sorted({alpha for block in found.blocks for alpha in block.alphas})
    pairs: list[tuple[str, object]] = [
        ("Method", ", ".join(_unique(block.method for block in found.blocks)) or "unknown"),
        ("Format", found.format or "unknown"),
        *([("For models of", found.family)] if found.family else []),
        ("Trained on", (base or "not stated in the file")[:200]),
        ("Rank", _span(ranks) or "none"),
        ("Alpha", _span(alphas) or "same as the rank"),
        ("Layers", f"{sum(block.layers for block in found.blocks):,}"),
        ("Parameters", f"{sum(block.values for block in found.blocks):,} in {found.tensors:,} tensors"),
        ("Size", size(found.size)),
        ("Trigger tokens", ", ".join(word[:80] for word in found.words[:20]) or "none"),
    ]
    rows = [(b.name, b.method, b.layers, _span(b.ranks), _span(b.alphas), b.values) for b in found.blocks]
    head = ("Block", "Method", "Layers", "Rank", "Alpha", "Parameters")
    blocks = table("Adapters by block of the model", head, rows) if rows else ""
    return facts(pairs) + blocks + name_list("Header entries", found.header)


def describe_fit(found: FileSummary, base: str) -> str:
    """Compatibility report: used, unused, missing and misshapen tensors."""
    if found.fits:
        verdict_note = note(f"Compatible with {base}: all {len(found.used):,} tensors are used.", "good")
    elif found.used:
        verdict_note = note(
            f"Partly compatible with {base}: {len(found.used):,} tensors are used; the others are listed below.", "bad"
        )
    else:
        verdict_note = note(f"Not compatible with {base}. Choose the base model that it was trained on.", "bad")
    lists = [
        name_list("Unused: in the file, but not in the base model", found.unused),
        name_list("Missing: needed by the adapter, but not in the file", found.missing),
        name_list("Wrong shape for the base model", found.misshapen),
    ]
    return verdict_note + "".join(note(text[:1000]) for text in found.notes[:8]) + "".join(lists)


def size(count: int) -> str:
    """Formats a number of bytes."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def _span(values: Sequence[float]) -> str:
    pairs = [f"{value:.4g}" for value in values]
    return "" if not pairs else pairs[0] if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"


def _unique(found: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(found))
