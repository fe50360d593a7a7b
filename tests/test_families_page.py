"""The table of `docs/families.md` is that of the registries. `python -m tests.test_families_page` prints it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers

from veneer.hosts._diffusion_transformers import records
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.families import families

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
UNET = "UNet2DConditionModel"


def denoiser_of(pipeline: str, component: str) -> str:
    """Name of the class of a pipeline's denoiser, by the annotation of its constructor."""
    annotation: Any = inspect.signature(getattr(diffusers, pipeline).__init__).parameters[component].annotation
    return str(getattr(annotation, "__name__", annotation)).rpartition(".")[2]


def table() -> str:
    """The rows: denoisers that adapters attach to, and the pipelines that train and generate with them."""
    pipelines: dict[str, list[str]] = {UNET: [], **{name: [] for record in records().values() for name in record.classes}}
    for kind in families().values():
        pipelines.setdefault(denoiser_of(kind.pipelines[0], kind.denoiser), []).extend(kind.pipelines)
    attached = {UNET, *(name for record in records().values() for name in record.classes)}
    rows = ["| UNet or transformer | attach | train, generate |", "| --- | --- | --- |"]
    for name in sorted(pipelines, key=lambda name: (not pipelines[name], name.lower())):
        trained = ", ".join(f"`{pipeline}`" for pipeline in pipelines[name]) or "no"
        rows.append(f"| `{name}` | {'yes' if name in attached else 'no'} | {trained} |")
    return "\n".join(rows)


def test_the_page_has_the_table_of_the_registries() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_denoisers_are_read_from_annotations() -> None:
    assert denoiser_of("ZImagePipeline", "transformer") == "ZImageTransformer2DModel"
    assert denoiser_of("StableDiffusionPipeline", "unet") == type(tiny_pipeline("sd").unet).__name__ == UNET


if __name__ == "__main__":
    print(table())
