"""Write captions of photos by a captioning model or tagger, beside the photos."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer.atomic_files import write_atomically
from veneer.base_models.devices import resolve_device
from veneer.captioning import open_captioner
from veneer.injection import OptionError
from veneer.training.data.image_io import read_photo
from veneer.training.data.photo_folder import READ, REFUSED, Photo, find_photos

__all__ = ["CaptionConfig", "caption"]


@dataclass(frozen=True)
class CaptionConfig:
    """Configuration of `veneer caption` and its defaults.

    Args:
        folder: folder of photos, or one photo.
        model: local folder or hub name of a BLIP, a GIT, an image classifier of transformers, or a WD tagger; required.
        prefix: text before each caption, such as `a photo of <toy>, `.
        threshold: smallest probability of a tag, 0 to 1; without effect on models that generate sentences.
        max_tokens: largest length of a generated sentence.
        batch: photos per forward pass.
        recursive: also read subfolders, except `masks` and hidden ones.
        caption_extension: ending of caption files.
        overwrite: replace captions that photos have already.
        dry_run: print the captions and write nothing.
        device: device such as `cuda` (default: a GPU if there is one).
    """

    folder: Path
    model: str
    prefix: str = ""
    threshold: float = 0.35
    max_tokens: int = 40
    batch: int = 8
    recursive: bool = False
    caption_extension: str = ".txt"
    overwrite: bool = False
    dry_run: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        for name, given in (("batch", self.batch), ("max_tokens", self.max_tokens)):
            if given < 1:
                raise OptionError(f"{name} is {given}; expected at least 1.", option=name, given=given, expected=1)
        if not 0 <= self.threshold <= 1:
            message = f"threshold is {self.threshold:g}; expected a probability from 0 to 1."
            raise OptionError(message, option="threshold", given=self.threshold, expected=(0, 1))
        ending = self.caption_extension.rpartition(".")[2]
        is_text = re.fullmatch(r"(\.[\w-]+)+", self.caption_extension) and f".{ending.lower()}" not in READ | REFUSED
        if not is_text:
            message = f"caption_extension is {self.caption_extension!r}; expected an ending of text files such as .txt."
            raise OptionError(message, option="caption_extension", given=self.caption_extension, expected=".txt")


def caption(config: CaptionConfig) -> Iterator[str]:
    """Yields one line per photo with its caption, and writes each caption beside its photo, such as `01.txt` for `01.jpg`.

    Photos that have a caption, in such a file or in the metadata of the folder, are left out without `overwrite`.

    Raises:
        DataError: no photos, or unreadable ones.
        CaptionError: the model is not supported, or its folder incomplete.
        HubError: the model cannot be downloaded.
    """
    photos = find_photos(config.folder, recursive=config.recursive, caption_extension=config.caption_extension)
    first = {_file(photo, config): photo for photo in reversed(photos)}  # of photos of one stem, which share a file
    files = sorted(file for file, photo in first.items() if config.overwrite or not _has_caption(photo, config))
    count = 0
    if files:
        model = open_captioner(config.model, resolve_device(config.device), config.threshold, config.max_tokens)
        for start in range(0, len(files), config.batch):
            part = files[start : start + config.batch]
            texts = model.captions([read_photo(first[file].path) for file in part])
            for file, text in zip(part, texts, strict=True):
                yield f"{first[file].path}: {config.prefix + text if text else 'no caption'}"
                if text and not config.dry_run:
                    write_atomically(file, f"{config.prefix}{text}\n".encode())
                count += bool(text)
    kept = len(photos) - len(files)
    yield f"{count} captions {'not written (dry run)' if config.dry_run else 'written'}, {kept} photos left as they were"
    if count and not config.dry_run:
        yield f"read the captions, then train: veneer personalize {shlex.quote(str(config.folder))} --concept '<NAME>'"


def _file(photo: Photo, config: CaptionConfig) -> Path:
    return photo.path.with_suffix(config.caption_extension)


def _has_caption(photo: Photo, config: CaptionConfig) -> bool:
    return photo.caption is not None or _file(photo, config).exists()
