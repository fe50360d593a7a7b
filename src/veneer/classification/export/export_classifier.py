"""Writes a classifier in an export format, and keeps the result only if it computes the same logits."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from veneer.atomic_files import sync_folder, write_json
from veneer.extras import require
from veneer.injection import Attachment, OptionError, SaveError, UnsupportedSite, attachments
from veneer.training.loop.disk_space import writing
from veneer.training.loop.seeds import generator

from ..models.classifier import Classifier
from . import onnx_file, open_clip_folder, timm_folder, torch_export_file
from .export_format import ExportError, ExportFormat, ExportSource, Run
from .metadata import graph_metadata

FORMATS = {each.FORMAT.name: each.FORMAT for each in (timm_folder, onnx_file, torch_export_file, open_clip_folder)}
BATCHES = (1, 3)
"""Batch sizes of the comparison; the graph is traced with another one."""
TOLERANCE = 1e-4
"""Largest allowed difference of a logit, as a share of the largest logit."""


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Args:
        files: what was written: the file or folder, then files beside it.
        difference: largest absolute difference of a logit to those of `veneer predict` in float32. `scale`: the largest logit.
    """

    files: tuple[Path, ...]
    difference: float
    scale: float


def export_classifier(source: ExportSource, to: str, out: Path) -> ExportReport:
    """Writes the file or folder, opens it without veneer, and compares the logits of random images.

    The model is unchanged afterwards. Adapters are merged into the weights as far as their methods can be merged; a graph
    contains the others.

    Args:
        to: name of the format. `out`: a new file, or a new folder for `timm` and `open_clip`.
    Raises:
        ExportError: the format does not support the model or a method, or the logits differ by more than `TOLERANCE`; nothing is
            written. MissingExtra: a library of the format is not installed. SaveError: `out` exists. OptionError: wrong suffix of
            `out`, or normalization in a format that is no graph.
    """
    form = FORMATS[to]
    require(*form.libraries)
    _check(form, source, out)
    with torch.no_grad():
        samples = [(pixels, _expected(source, pixels)) for pixels in _random_images(source)]
    with _staging(out) as folder, _merged(source, form):
        target = folder / out.name
        with writing(out.parent, out.name):
            form.write(source, target)
            if form.is_graph:
                write_json(target.with_name(f"{out.name}.json"), graph_metadata(source))
        difference, scale = _compare(form, form.load(target), samples)
        return ExportReport(_publish(folder, out), difference, scale)


def working_formats(classifier: Classifier) -> tuple[str, ...]:
    """Names of the formats that support the model and its methods."""
    names = [name for name, form in FORMATS.items() if not form.rejection(classifier)]
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_merge_in_order(attachments(classifier.model), strict=True))
        except UnsupportedSite:
            return tuple(name for name in names if FORMATS[name].is_graph)
    return tuple(names)


def _check(form: ExportFormat, source: ExportSource, out: Path) -> None:
    reason = form.rejection(source.classifier)
    if reason:
        works = working_formats(source.classifier)
        message = f"{form.name}: {reason}. Formats that work: {', '.join(works)}."
        raise ExportError(message, where=form.name, given=reason, expected=works)
    if source.include_normalization and not form.is_graph:
        graphs = tuple(name for name, each in FORMATS.items() if each.is_graph)
        message = f"{form.name} stores weights, to which normalization cannot be added; it works with {', '.join(graphs)}."
        raise OptionError(message, option="include_normalization", method=form.name, given=True, expected=graphs)
    if out.suffix != form.suffix and form.suffix:
        message = f"--out {out}: expected a name that ends in {form.suffix}."
        raise OptionError(message, option="out", method=form.name, given=str(out), expected=form.suffix)


@contextlib.contextmanager
def _merged(source: ExportSource, form: ExportFormat) -> Iterator[None]:
    """Merges the attachments inside the block: all for weights, for a graph up to the first that cannot be merged."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_merge_in_order(source.attached, strict=not form.is_graph))
        except UnsupportedSite as error:
            works = working_formats(source.classifier)
            message = (
                f"{form.name} needs methods that can be merged into the weights: {error} Formats that work: {', '.join(works)}."
            )
            raise ExportError.from_error(error, message, where=form.name, given=error.site, expected=works) from error
        yield


@contextlib.contextmanager
def _merge_in_order(attached: Sequence[Attachment], strict: bool) -> Iterator[None]:
    merged: list[Attachment] = []
    try:
        for attachment in attached:
            try:
                attachment.merge()
            except UnsupportedSite:
                if strict:
                    raise
                break
            merged.append(attachment)
        yield
    finally:
        for attachment in reversed(merged):
            attachment.unmerge()


def _random_images(source: ExportSource) -> list[Tensor]:
    """Seeded inputs: normalized pixels, or pixels in 0 to 1 if the graph normalizes them."""
    rng, shape = generator(0, "export"), source.data["input_size"]
    sample = torch.rand if source.include_normalization else torch.randn
    return [sample(size, *shape, generator=rng) for size in BATCHES]


def _expected(source: ExportSource, pixels: Tensor) -> Tensor:
    """Logits of the attached model."""
    if source.include_normalization:
        mean, std = (torch.tensor(source.data[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        pixels = (pixels - mean) / std
    logits: Tensor = source.model(pixels)
    return logits


def _compare(form: ExportFormat, run: Run, samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The largest absolute difference of a logit, and the largest logit.

    Raises:
        ExportError: the difference is too large, or not a number.
    """
    scale = max(float(logits.abs().max()) for _, logits in samples)
    difference = max(float((run(pixels) - logits).abs().max()) for pixels, logits in samples)
    if not difference <= TOLERANCE * scale:
        message = (
            f"{form.name}: the exported logits differ by {difference:.2g} from those of the trained model; expected at most "
            f"{TOLERANCE * scale:.2g}, {TOLERANCE:g} of the largest logit. Nothing was written; use another format."
        )
        raise ExportError(message, where=form.name, given=difference, expected=TOLERANCE * scale)
    return difference, scale


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, deleted at the end.

    Raises:
        SaveError: `out`, or a file that is written beside it, exists.
    """
    for path in (out, *(out.with_name(f"{out.name}{suffix}") for suffix in (".json", ".data"))):
        if path.exists():
            raise SaveError(f"{path}: already exists. Choose another --out.", file=path, given="exists")
    folder = out.parent / f".saving-{out.name}-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path) -> tuple[Path, ...]:
    """Moves the files of the temporary folder into place, `out` last."""
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == out.name)
    for name in names:
        os.replace(folder / name, out.parent / name)
    sync_folder(out.parent)
    return tuple(out.parent / name for name in reversed(names))
