"""Teach a diffusion base to follow maps or pictures, and draw with what was learnt."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image

from veneer import base_models
from veneer.control.artifacts import Run, look, write_files, write_maps, write_outcome
from veneer.control.config import ControlConfig
from veneer.control.evaluation import Subject
from veneer.control.generation import DrawConfig, draw_under
from veneer.control.image_embedding import Embedder, embedder
from veneer.control.loss import ControlLoss, FollowMaps, FollowPictures
from veneer.control.maps import maps
from veneer.control.maps.resize import resized
from veneer.control.training_images import Pictures, open_pictures
from veneer.injection import Attachment, attach
from veneer.training import param_groups
from veneer.training.data.captions import Captions
from veneer.training.data.class_images import base_digest
from veneer.training.data.dataset import PhotoDataset
from veneer.training.data.image_io import read_photo
from veneer.training.data.latent_cache import Cache
from veneer.training.data.photo_folder import Photo
from veneer.training.families import family
from veneer.training.loop.distributed import on_main
from veneer.training.loop.seeds import mix
from veneer.training.loop.trainer import Trainer
from veneer.training.preflight.estimates import written_bytes
from veneer.training.preflight.preflight import require_disk
from veneer.training.report.phases import PhaseReport
from veneer.training.report.progress import ProgressLine
from veneer.training.report.run_folder import discard_unused, run_folder, stopped
from veneer.training.report.verdict import read_verdict

from .generate import base_of, parse_adapter

__all__ = ["ControlConfig", "DrawConfig", "control", "draw"]


def control(config: ControlConfig, accelerator: Accelerator | None = None) -> Path:
    """Train, measure whether it is followed, and write `adapter.safetensors`, `diffusers/`, `sheet.png` and `result.json`.

    Returns:
        The folder with the results.
    Raises:
        VeneerError: what was given cannot work; nothing has been trained then.
        Diverged: the loss is no longer finite; the last good weights are in the folder.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.accelerator.is_available())
    config = on_main(accelerator, config.completed)
    with discard_unused(config.out):
        return _run(config, accelerator)


def _run(config: ControlConfig, accelerator: Accelerator) -> Path:
    config.built()
    out = run_folder(config.out, config.resume, config.data)
    report = (
        PhaseReport(None if config.dry_run else out / "progress.jsonl", sys.stderr)
        if accelerator.is_main_process
        else PhaseReport()
    )
    report("loading")
    pipe = base_models.load(config.base).to(accelerator.device)
    param_groups.freeze(pipe)
    kind = family(pipe)
    pictures = on_main(accelerator, lambda: open_pictures(config, kind, out, _counted(config, report)))
    report.close()
    for note in pictures.notes if accelerator.is_main_process else ():
        print(f"note: {note}", flush=True)
    digest = base_digest(kind)
    reads = embedder(pipe) if config.reads_pictures else None
    attached = _attach(config, pipe, reads)
    resolution = config.resolution or kind.resolution
    if config.gradient_checkpointing:
        param_groups.checkpoint(kind.tower)
    run = Run(config, pipe, attached, _subjects(config, pictures, resolution), reads, out, report=report)
    dataset = PhotoDataset(
        pictures.train, resolution, kind.multiple, config.seed, captions=Captions(dropout=config.caption_dropout or 0.0),
        flip=config.flip, crop=config.crop, buckets=config.buckets and not kind.square, masks=False,
        guide=_guide(pictures) if pictures.guides else None,
    )  # fmt: skip
    loop = config.loop()
    loss = ControlLoss(
        kind, dataset, config.seed, loop.samples, config.objective(), cache=Cache(config.cache_folder) if config.cache else None,
        control=attached, follow=_follow(config, reads),
    )  # fmt: skip
    if accelerator.is_main_process:
        write_maps(run)
        print(_plan(run, pictures, loop.steps), flush=True)
    if config.dry_run:
        return out
    values = sum(parameter.numel() for parameter in attached.parameters())
    images = 3 * len(run.subjects) * (config.eval_seeds + loop.steps // max(1, loop.preview_every))
    require_disk(out, written_bytes(values, loop, images, resolution))
    trainer = Trainer(
        loop,
        [{**group, "name": f"{attached.name}.{n}"} for n, group in enumerate(attached.groups()) if group["params"]],
        param_groups.with_penalties(loss, [attached]),
        param_groups.named_state([attached]),
        out,
        identity={**config.identity(), "base": digest, "pictures": [p.digest for p in (*pictures.train, *pictures.held)]},
        accelerator=accelerator,
        after_step=param_groups.after_step([attached]),
        on_step=ProgressLine(),
        on_preview=lambda step: look(run, step),
    )
    result = trainer.fit(config.resume)
    if accelerator.is_main_process:
        with trainer.averaged():
            if result.stopped:
                write_files(run)
                print(stopped(result, loop.steps, out))
            else:
                print(_told(write_outcome(run, result), out))
    accelerator.wait_for_everyone()
    return out


def draw(config: DrawConfig) -> list[Path]:
    """Draw under maps or pictures, with whatever else is loaded beside, and write one PNG a picture.

    Raises:
        VeneerError: an adapter that is not there or does not fit the base, or pictures that do not fit the adapters.
    """
    adapters = [parse_adapter(text) for text in config.adapter]
    base = config.base or next((found for path, _ in adapters if (found := base_of(path))), "bundled")
    return draw_under(config, adapters, base)


def _attach(config: ControlConfig, pipe: Any, reads: Embedder | None) -> Attachment:
    method = config.built()
    if reads is not None and "width" not in config.options.get(config.method, {}):
        method = type(method).from_config({**method.config(), "width": reads.width})
    torch.manual_seed(mix(config.seed, "adapters", method.name))
    return attach(pipe, method, train=config.train or ())


def _follow(config: ControlConfig, reads: Embedder | None) -> FollowMaps | FollowPictures:
    if reads is not None:
        return FollowPictures(reads, config.image_dropout, config.seed)
    return FollowMaps(maps.get(str(config.condition)))


def _guide(pictures: Pictures) -> Any:
    """A reader of the maps that someone made, at the size that a photo is resized to."""

    def read(photo: Photo, size: tuple[int, int]) -> Image.Image:
        return resized(read_photo(pictures.guides[photo.path]), size[::-1])

    return read


def _subjects(config: ControlConfig, pictures: Pictures, side: int) -> list[Subject]:
    """The held pictures, square, with their maps."""
    condition, found = maps.get(str(config.condition)), []
    for photo in pictures.held:
        square = functools.partial(_square, side=side)
        picture = square(read_photo(photo.path))
        if photo.path in pictures.guides:
            guide = square(resized(read_photo(pictures.guides[photo.path]), photo.size[::-1]))
        else:
            guide = condition(picture) if condition.is_computed else picture
        caption = "" if config.reads_pictures else photo.caption or ""  # the picture alone is to say what is drawn
        found.append(Subject(caption, picture, guide))
    return found


def _square(picture: Image.Image, side: int) -> Image.Image:
    """The middle of a picture."""
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    return picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)


def _counted(config: ControlConfig, report: PhaseReport) -> Callable[[int, int], None] | None:
    """Counts the images that the base generates where no data is given."""
    return None if config.data is not None else report("class_images", config.generated_images).reach


def _plan(run: Run, pictures: Pictures, steps: int) -> str:
    """What will be trained, on what."""
    config, numbers = run.config, sum(p.numel() for p in run.control.parameters())
    lines = [
        f"{config.method}, {numbers:,} numbers, follows {config.condition} on {config.base}; look at {run.out / 'maps.png'}",
        f"{len(pictures.train)} pictures to train, {len(pictures.held)} to measure; {steps:,} steps of "
        f"{(config.batch or 1) * config.gradient_accumulation_steps}, rate {config.learning_rate:g}",
    ]
    return "\n".join(lines)


def _told(record: dict[str, Any], out: Path) -> str:
    figures = record["figures"]
    if figures is None:
        return f"{out}: written, and not evaluated\n{_verdict(record)}"
    free, misled = (_over(*figures[name]) for name in ("over_free", "over_misled"))
    return (
        f"{figures['measure']}: {figures['followed']:.3f} with what is given, {figures['free']:.3f} without ({free}), "
        f"{figures['misled']:.3f} with another's ({misled}); in {out}\n"
        f"{_verdict(record)}"
    )


def _verdict(record: dict[str, Any]) -> str:
    return read_verdict(record).text()


def _over(difference: float, half: float | None) -> str:
    return f"{difference:+.3f}" if half is None else f"{difference:+.3f} ± {half:.3f}"


if __name__ == "__main__":
    from veneer.cli import main

    sys.exit(main(["control", *sys.argv[1:]]))
