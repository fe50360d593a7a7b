"""Generation on the page Generate: with adapters, compared with the base model, or as a strength sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from veneer.pipelines.generate import is_diffusion_adapter

from veneer.control.generation import condition_argument
from veneer.injection import OptionError, VeneerError
from veneer.training.report.image_grid import GridRow, make_grid
from veneer.training.report.png_metadata import save_png

from ...context import Context, escape_markup
from ...generator import AdapterUse
from ...limits import LIMITS
from ...workspace import Workspace
from ..shared.generation_request import (
    GalleryItem,
    GenerationRequest,
    generate_batches,
    read_request,
    save_image,
    select_adapters,
    truncate_prompts,
)
from ..shared.images import new_folder

SWEEP_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
"""Scale factors of a strength sweep."""
MODES = {"With the adapters": "with", "Without and with the adapters": "both", "Strength sweep": "sweep"}
GalleryUpdates = Iterator[tuple[list[GalleryItem], str]]


def text_adapters(workspace: Workspace) -> list[str]:
    """Names of adapters that need no condition other than the prompt."""
    return [name for name, file in workspace.all_adapters().items() if _is_text_adapter(file)]


def _is_text_adapter(file: Path) -> bool:
    try:
        return is_diffusion_adapter(file) and condition_argument(file) is None
    except (VeneerError, OSError):
        return False


def generate(
    context: Context,
    workspace: Workspace,
    generation: GenerationRequest,
    names: Sequence[str],
    strengths: Sequence[Any],
    mode: str,
) -> GalleryUpdates:
    """Yields all images so far with captions, and the progress; a sweep ends with an image grid in first place.

    Raises:
        VeneerError: an invalid request.
    """
    uses = select_adapters(workspace, names, strengths)
    kinds = {"with": 1, "both": 2, "sweep": len(SWEEP_SCALES)}
    if mode not in kinds:
        message = "choose a comparison: with the adapters, without and with, or a strength sweep."
        raise OptionError(message, option="way", given=mode, expected=tuple(kinds))
    if mode != "with" and not uses:
        message = "no adapter is selected to compare. Select one, or generate with the base model alone."
        raise OptionError(message, option="adapters", given=0)
    count = generation.count * kinds[mode]
    if count > LIMITS.images:
        message = f"this needs {count} images; expected at most {LIMITS.images}. Choose fewer."
        raise OptionError(message, option="pictures", given=count, expected=LIMITS.images)
    context.images.take(workspace.user, count)
    yield [], f"0 of {count}"
    generation, note = truncate_prompts(context.generator, generation, uses)
    for items, progress in (_sweep if mode == "sweep" else _generate_images)(context, generation, uses, mode):
        yield items, f"{progress}\n\n{note}" if note else progress


def _generate_images(context: Context, generation: GenerationRequest, uses: dict[str, AdapterUse], mode: str) -> GalleryUpdates:
    """Generates the images; for a comparison each follows the base model's image from the same noise."""
    folder, items = new_folder(), list[GalleryItem]()
    count = generation.count * (2 if mode == "both" else 1)
    without_adapters: Any = (
        generate_batches(context.generator, generation, uses, without_adapters=True) if mode == "both" else None
    )
    for made in generate_batches(context.generator, generation, uses):
        without = next(without_adapters) if without_adapters else [None] * len(made)
        for image, other in zip(made, without, strict=True):
            if other is not None:
                items.append(save_image(folder, other, generation, {}, "without"))
            items.append(save_image(folder, image, generation, uses, "with" if without_adapters else ""))
        yield [*items], f"{len(items)} of {count}"


def _sweep(context: Context, generation: GenerationRequest, uses: dict[str, AdapterUse], mode: str) -> GalleryUpdates:
    """Generates an image grid, one row per seed and one column per strength, and its images."""
    folder, items, columns = new_folder(), list[GalleryItem](), list[list[Any]]()
    for scale in SWEEP_SCALES:
        scaled = {name: AdapterUse(use.file, scale * use.strength) for name, use in uses.items()}
        columns.append(
            [p for made in generate_batches(context.generator, generation, scaled, without_adapters=scale == 0) for p in made]
        )
        items += [save_image(folder, p, generation, scaled, f"strength × {scale:g}") for p in columns[-1]]
        yield [*items], f"{len(items)} of {generation.count * len(SWEEP_SCALES)}"
    rows = [GridRow(f"seed {row[0].seed}", tuple((p.image,) for p in row)) for row in zip(*columns, strict=True)]
    grid = make_grid(rows, title=generation.prompt, note=", ".join(uses), columns=[f"× {scale:g}" for scale in SWEEP_SCALES])
    facts = {
        **columns[-1][0].settings,
        "base": generation.base,
        "adapters": [{"file": n, "scale": u.strength} for n, u in uses.items()],
    }
    file = save_png(grid, folder / "strengths.png", facts)
    yield [(str(file), "all strengths"), *items], f"{len(items)} images and an image grid"


def read_image_settings(workspace: Workspace, path: str | Path | None) -> tuple[GenerationRequest, dict[str, float], str]:
    """Settings saved in an image, and a note for the user.

    Raises:
        VeneerError: see `read_request`.
    """
    generation, strength_of, unknown = read_request(workspace, path)
    note = "The settings are filled in. Press *Generate*."
    if unknown:
        note = f"The settings are filled in, except for adapters that you do not have: {', '.join(map(escape_markup, unknown))}."
    return generation, strength_of, note
