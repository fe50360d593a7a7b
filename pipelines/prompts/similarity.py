"""Compare trained prompts: which of them suits another task as the initial prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from veneer.base_models.devices import resolve_device
from veneer.classification.data.labeled_images import LIMITS
from veneer.classification.data.transforms import EvalView
from veneer.classification.image_paths import find_images
from veneer.classification.predict import open_predictor
from veneer.injection import OptionError
from veneer.prompt_transfer import activated_neurons, average_similarity, neuron_overlap, read_prompts, token_similarity
from veneer.prompt_transfer.stored_prompts import check_comparable
from veneer.training.data.image_io import decode

__all__ = ["PromptSimilarityConfig", "prompt_similarity"]


@dataclass(frozen=True)
class PromptSimilarityConfig:
    """Configuration of `veneer prompts similarity` and its defaults.

    Args:
        files: at least two adapter files or run folders with prompts of one model and method, such as vpt or coop.
        images: image file, folder of images, or list of paths, for the overlap of activated neurons; the files must then be run
            folders of `veneer transfer`.
        batch: images per forward pass, at least 1.
        device: device such as `cuda` (default: a GPU if there is one).
    """

    files: tuple[Path, ...]
    images: Path | None = None
    batch: int = 32
    device: str | None = None

    def __post_init__(self) -> None:
        if len(self.files) < 2:
            message = f"files are {', '.join(map(str, self.files)) or 'missing'}; expected at least two to compare."
            raise OptionError(message, option="files", given=tuple(map(str, self.files)), expected=2)
        if self.batch < 1:
            raise OptionError(f"batch is {self.batch}; expected at least 1.", option="batch", given=self.batch, expected=1)


def prompt_similarity(config: PromptSimilarityConfig) -> list[str]:
    """Compares the prompts of each pair of files.

    Returns:
        A line for each pair, the most similar one first: cosine of the average tokens, mean cosine of the tokens, and with images
        the overlap of activated neurons.
    Raises:
        StoredPromptError: a file has no prompts, or two files have prompts of other sites or widths. LoadError: a corrupt file.
        VeneerError: images without run folders, or no images.
    """
    prompts = [read_prompts(file) for file in config.files]
    for file, other in zip(config.files[1:], prompts[1:], strict=True):
        check_comparable(prompts[0], other, str(file))
    neurons = None if config.images is None else [_neurons(config, file) for file in config.files]
    rows = []
    for i, j in itertools.combinations(range(len(prompts)), 2):
        average, tokens = average_similarity(prompts[i], prompts[j]), token_similarity(prompts[i], prompts[j])
        text = f"{config.files[i]} {config.files[j]}: average tokens {average:.4f}, tokens {tokens:.4f}"
        overlap = "" if neurons is None else f", activated neurons {neuron_overlap(neurons[i], neurons[j]):.4f}"
        rows.append((average, text + overlap))
    return [text for _, text in sorted(rows, key=lambda row: -row[0])]


def _neurons(config: PromptSimilarityConfig, folder: Path) -> Tensor:
    """The neurons that the images activate in the model of a run."""
    if not folder.is_dir():
        message = f"{folder} is a file; with --images expected run folders of veneer transfer, which have the model."
        raise OptionError(message, option="images", file=folder, given=str(folder), expected="run folders")
    assert config.images is not None
    predictor = open_predictor(folder, resolve_device(config.device))
    files = find_images([config.images])

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(files), config.batch):
            yield _pixels(files[start : start + config.batch], predictor.view).to(predictor.device)

    return activated_neurons(predictor.classifier.model, batches())


def _pixels(files: Sequence[Path], view: EvalView) -> Tensor:
    """Preprocessed images, (batch, channels, height, width)."""
    return torch.stack([view(decode(file.read_bytes(), file.name, LIMITS, remarks=False).rgb) for file in files])
