"""The table of `docs/families.md`: its cells as the registries and the tests of file formats have them. `python -m` prints it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch

from tests.formats.transformer_peers import PEERS
from tests.formats.transformer_peers import tiny as peer_model
from tests.training.flow_families import tiny as flow
from tests.training.language_model_families import tiny as language_model
from tests.training.recent_families import tiny as recent
from tests.training.transformer_families import tiny as transformer
from tests.training.video_families import tiny as video
from veneer import attach
from veneer.formats import formats
from veneer.hosts._diffusion_transformers import records
from veneer.injection import Attachment, SaveError
from veneer.testing.pipelines import FAMILIES, tiny_pipeline
from veneer.training.families import families

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
UNET = "UNet2DConditionModel"
COLUMNS = ("attach", "train", "generate", "quantized", "files read", "files written")
FORMATS = ("diffusers", "kohya", "comfyui", "onetrainer", "xlabs")
"""Formats that are written for other tools. Native files, folders of peft and LyCORIS files have the sites of every family."""
FILES = "tests.formats.test_transformer_files:test_files_of_other_tools"
EVIDENCE: Mapping[str, Mapping[str, str]] = {
    UNET: {
        "kohya": "tests.formats.test_kohya:test_both_spellings_are_read[sd]",
        "diffusers": "tests.formats.test_diffusers:test_what_diffusers_itself_has_saved[False]",
        "diffusers_old": "tests.formats.test_diffusers_old:test_the_unet_alone_without_its_name",
        "cloneofsimo": "tests.formats.test_cloneofsimo:test_a_bare_unet_takes_its_part",
    },
    "FluxTransformer2DModel": {
        "bfl": "tests.formats.test_bfl:test_a_control_lora_is_what_diffusers_makes_of_it",
        "kohya": "tests.formats.test_kohya_names:test_flux_is_split_as_diffusers_splits_it",
        "onetrainer": "tests.formats.test_onetrainer:test_omi_names_with_numbered_projections[flux]",
        "xlabs": "tests.formats.test_xlabs:test_read_as_diffusers_reads_it[diffusion_model.]",
    },
    "PixArtTransformer2DModel": {
        "diffusers": "tests.formats.test_diffusers:test_peft_makes_the_same_change_where_diffusers_has_no_loader[pixart]"
    },
    "DiTTransformer2DModel": {
        "diffusers": "tests.formats.test_diffusers:test_peft_makes_the_same_change_where_diffusers_has_no_loader[dit]"
    },
}
"""Class -> format -> test of its files as another tool writes or reads them, beside those of `PEERS`."""


class Cell(NamedTuple):
    """One cell of the table: class of the denoiser, column, and text."""

    denoiser: str
    column: str
    text: str

    def __str__(self) -> str:
        return f"{self.denoiser} {self.column}"

    @property
    def names(self) -> tuple[str, ...]:
        """Formats of a cell of files."""
        return tuple(re.findall(r"`(\w+)`", self.text))


def tiny_of(family: str) -> Any:
    """A tiny pipeline of a training family."""
    if family in FAMILIES:
        return tiny_pipeline(family)
    module: Any = next(module for module in (flow, language_model, recent, transformer, video) if family in module.PIPELINES)
    return module.tiny(family)


def denoiser_of(pipeline: str, component: str) -> str:
    """Name of the class of a pipeline's denoiser, by the annotation of its constructor."""
    annotation: Any = inspect.signature(getattr(diffusers, pipeline).__init__).parameters[component].annotation
    return str(getattr(annotation, "__name__", annotation)).partition(" | ")[0].rpartition(".")[2]


@functools.cache
def trained() -> dict[str, tuple[str, ...]]:
    """Class of a denoiser -> training families with it."""
    names: dict[str, tuple[str, ...]] = {}
    for family, kind in families().items():
        denoiser = denoiser_of(kind.pipelines[0], kind.denoiser)
        names[denoiser] = (*names.get(denoiser, ()), family)
    return names


def denoisers() -> list[str]:
    """Classes of all denoisers, those that train first."""
    names = {UNET, *(name for record in records().values() for name in record.classes)}
    return sorted(names, key=lambda name: (name not in trained(), name.lower()))


def tiny_denoiser(name: str) -> Any:
    """A tiny model of a class, always with the same weights."""
    if name == UNET:
        return tiny_pipeline("sd").unet
    record = next(record for record in records().values() if name in record.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return recent.with_values(record.build(**next(iter(record.tiny.values()))))


def save_in_formats(lora: Attachment, folder: Path) -> dict[str, Path]:
    """Saves an attachment in every format that can hold it. Format -> file."""
    paths = {}
    for form in FORMATS:
        with contextlib.suppress(SaveError):
            paths[form] = formats.get(form)().save(lora, folder / form)
    return paths


@functools.cache
def peers() -> dict[str, dict[str, list[str]]]:
    """Class -> format -> tests of files of other tools."""
    ids: dict[str, dict[str, list[str]]] = {}
    classes = {family: type(peer_model(family)).__name__ for family in {peer.family for peer in PEERS}}
    for peer in PEERS:
        ids.setdefault(classes[peer.family], {}).setdefault(peer.form, []).append(f"{FILES}[{peer}]")
    for name, known in EVIDENCE.items():
        for form, test in known.items():
            ids.setdefault(name, {}).setdefault(form, []).append(test)
    return ids


def row(name: str, forms: Collection[str]) -> tuple[str, ...]:
    """The cells of a class, of which LoRA is written in the formats `forms`."""
    known = {*forms, *peers().get(name, {})}
    read = [*(form for form in FORMATS if form in known), *sorted(known - {*FORMATS})]
    trains = "yes" if name in trained() else "no (1)"
    return "yes", trains, trains, "yes", *(", ".join(f"`{form}`" for form in names) for names in (read, forms))


def table(forms: Mapping[str, Collection[str]]) -> str:
    """The table in Markdown, for the formats in which LoRA of each class is written."""
    rows = [("UNet or transformer", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    rows += [(f"`{name}`", *row(name, forms[name])) for name in denoisers()]
    return "\n".join(f"| {' | '.join(texts)} |" for texts in rows)


def pipelines_table() -> str:
    """The pipelines of each class that trains, in Markdown."""
    rows = ["| UNet or transformer | pipelines |", "| --- | --- |"]
    for name in denoisers():
        names = [f"`{pipeline}`" for family in trained().get(name, ()) for pipeline in families()[family].pipelines]
        rows += [f"| `{name}` | {', '.join(names)} |"] if names else []
    return "\n".join(rows)


def page_cells() -> Iterator[Cell]:
    """The cells of the page."""
    lines = PAGE.read_text(encoding="utf-8").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| UNet or transformer | {COLUMNS[0]} |"))
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        name, *texts = (text.strip() for text in line.strip("|").split("|"))
        for column, text in zip(COLUMNS, texts, strict=True):
            yield Cell(name.strip("`"), column, text)


def notes() -> dict[str, str]:
    """The notes of the page by their number."""
    return dict(re.findall(r"^\((\d)\) (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def is_collected(test: str) -> bool:
    """True if pytest collects a test, `module:function[id]`: the function has this id among its parameters."""
    module, _, rest = test.partition(":")
    function, _, end = rest.partition("[")
    body = getattr(importlib.import_module(module), function, None)
    if body is None or not end:
        return body is not None and not any(mark.name == "parametrize" for mark in getattr(body, "pytestmark", ()))
    marks = [mark for mark in getattr(body, "pytestmark", ()) if mark.name == "parametrize"]
    return len(marks) == 1 and end.removesuffix("]") in {str(value) for value in marks[0].args[1]}


def main() -> None:
    """Prints both tables."""
    forms = {}
    for name in denoisers():
        with tempfile.TemporaryDirectory() as folder:
            forms[name] = save_in_formats(attach(tiny_denoiser(name), "lora", where="attn", rank=1), Path(folder)).keys()
    print(table(forms))
    print()
    print(pipelines_table())


if __name__ == "__main__":
    main()
