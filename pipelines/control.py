"""Train a control adapter that conditions a diffusion base model on maps or images, and generate with it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from PIL import Image

from veneer.base_models.schedulers import other_scheduler
from veneer.config_file import CONFIG, ConfigWriter
from veneer.control.artifacts import ControlRun, write_files, write_maps, write_preview, write_results
from veneer.control.config import ControlConfig
from veneer.control.evaluation import Subject
from veneer.control.generation import ControlGenerateConfig, generate_with_control
from veneer.control.image_embedding import Embedder, embedder
from veneer.control.loss import ControlLoss, ImageEmbeddingInput, MapInput
from veneer.control.maps import maps
from veneer.control.maps.resize import resize_map
from veneer.control.training_images import TrainingImages, generated_count, open_training_images
from veneer.injection import Attachment, attach
from veneer.training import prepare_base
from veneer.training.adapter_trainer import adapter_trainer
from veneer.training.base_sharding import is_sharding, load_base, shard_base, sharding_note
from veneer.training.block_learning_rates import with_block_rates
from veneer.training.data.captions import Captions
from veneer.training.data.class_images import base_digest
from veneer.training.data.dataset import PhotoDataset
from veneer.training.data.image_io import read_photo
from veneer.training.data.latent_cache import Cache
from veneer.training.data.photo_folder import Photo
from veneer.training.families import Family, family
from veneer.training.fixed_adapters import FixedAdapter, attach_fixed, parse_adapter, read_fixed, source_identity
from veneer.training.initial_adapter import read_initial
from veneer.training.loop.distributed import on_main
from veneer.training.loop.optimizers import ParameterGroup
from veneer.training.loop.seeds import mix
from veneer.training.loop.trainer import Trainer, TrainResult
from veneer.training.objective.forward_passes import ForwardPasses
from veneer.training.preflight.estimates import written_bytes
from veneer.training.preflight.preflight import require_disk
from veneer.training.report.phases import PhaseReport, report_of_run
from veneer.training.report.progress import ProgressLine
from veneer.training.report.run_folder import discard_unused, run_folder, stopped_message
from veneer.training.report.verdict import read_verdict
from veneer.training.save_dtype import rounded_to

from .convert import base_of
from .generate import note_missing_adapters

__all__ = ["ControlConfig", "ControlGenerateConfig", "control", "generate_controlled"]


def control(config: ControlConfig, accelerator: Accelerator | None = None) -> Path:
    """Trains, evaluates how well images follow the condition, and writes `adapter.safetensors`, `diffusers/`, `sheet.png` and
    `result.json`.

    Returns:
        The folder with the results.
    Raises:
        VeneerError: invalid options or data; nothing has been trained.
        Diverged: the loss is no longer finite; the last weights with a finite loss are in the folder.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.accelerator.is_available())
    config = on_main(accelerator, config.with_defaults)
    with discard_unused(config.out):
        return _run(config, accelerator)


def _run(config: ControlConfig, accelerator: Accelerator) -> Path:
    config.build_method()
    out = run_folder(config.out, config.resume, config.data)
    report = report_of_run(out, accelerator.is_main_process, config.dry_run)
    report("loading")
    pipe, fixed = _load(config, accelerator)
    kind = family(pipe)
    digest = base_digest(kind)

    def open_images() -> TrainingImages:
        return open_training_images(config, kind, out, _generation_progress(config, report), digest)

    data = None if is_sharding(config, accelerator) else on_main(accelerator, open_images)
    reads = embedder(pipe) if config.uses_image_embeddings else None
    attached, changes = _attach(config, pipe, reads)
    if config.gradient_checkpointing:
        prepare_base.enable_gradient_checkpointing(kind.tower)
    base = shard_base(config, kind, accelerator)
    if data is None:
        with attached.enabled(False):
            data = on_main(accelerator, open_images, base)
    report.close()
    subjects = _subjects(config, data, config.resolution or kind.resolution)
    run = ControlRun(config, pipe, attached, subjects, reads, out, report=report, base=base, fixed=fixed)
    loss = _loss(run, data, kind)
    sharding = sharding_note(config, base)  # gathers from all processes
    if accelerator.is_main_process:
        _print_start(run, data, [*([sharding] if sharding else []), *(f"note: {text}" for text in data.notes), *changes])
    if config.dry_run:
        return out
    require_disk(out, _written_bytes(run, kind))
    trainer = _trainer(run, data, loss, digest, accelerator)
    result = trainer.fit(config.resume)
    on_main(accelerator, lambda: _finish(run, trainer, result), base)
    return out


def _load(config: ControlConfig, accelerator: Accelerator) -> tuple[Any, list[FixedAdapter]]:
    """The frozen base model with the fixed adapters, and these."""
    pipe = load_base(config, accelerator)
    prepare_base.freeze(pipe)
    other_scheduler(pipe.scheduler, config.preview_scheduler)  # rejects one that does not fit
    fixed = read_fixed(config.with_)
    attach_fixed(pipe, fixed)
    return pipe, fixed


def _loss(run: ControlRun, data: TrainingImages, kind: Family) -> ControlLoss:
    """The training loss on the training images."""
    config = run.config
    dataset = PhotoDataset(
        data.train, config.resolution or kind.resolution, kind.multiple, config.seed,
        captions=Captions(dropout=config.caption_dropout or 0.0), flip=config.flip, crop=config.crop,
        buckets=config.buckets and not kind.square, masks=False, guide=_guide(data) if data.guides else None,
    )  # fmt: skip
    cache = Cache(config.cache_folder) if config.cache else None
    follow = _condition_input(config, run.embedder)
    samples = config.loop().samples
    return ControlLoss(
        kind, dataset, config.seed, samples, config.objective(), cache=cache, passes=ForwardPasses([run.control], config.seed),
        control=run.control, follow=follow,
    )  # fmt: skip


def _print_start(run: ControlRun, data: TrainingImages, notes: Sequence[str]) -> None:
    """Prints notes and the plan of a run, and writes its maps."""
    for text in notes:
        print(text, flush=True)
    write_maps(run)
    print(_plan(run, data, run.config.loop().steps), flush=True)


def _written_bytes(run: ControlRun, kind: Family) -> int:
    """Bytes of all files of a run."""
    config, loop = run.config, run.config.loop()
    parameters = sum(parameter.numel() for parameter in run.control.parameters())
    images = 3 * len(run.subjects) * (config.eval_seeds + loop.steps // max(1, loop.preview_every))
    return written_bytes(parameters, loop, images, config.resolution or kind.resolution)


def _trainer(run: ControlRun, data: TrainingImages, loss: ControlLoss, digest: str, accelerator: Accelerator) -> Trainer:
    """The trainer of a run.

    Args:
        digest: hash of the base model.
    """
    config, attached = run.config, run.control
    groups = [{**group, "name": f"{attached.name}.{n}"} for n, group in enumerate(attached.groups()) if group["params"]]
    identity = {**config.identity(), **source_identity(config.init_from, run.fixed), "base": digest}
    return adapter_trainer(
        [attached],
        loss,
        config.loop(),
        with_block_rates(cast(list[ParameterGroup], groups), [attached], config.block_lr),
        run.out,
        identity={**identity, "pictures": [p.digest for p in (*data.train, *data.held)]},
        accelerator=accelerator,
        base=run.base,
        on_step=ConfigWriter(run.out / CONFIG, "control train", config, ProgressLine()),
        on_preview=lambda step: write_preview(run, step),
    )


def _finish(run: ControlRun, trainer: Trainer, result: TrainResult) -> None:
    """Writes the results of a finished run, or the weights so far of a stopped one."""
    with trainer.averaged():
        if not result.stopped:
            run.control.finalize()
        with rounded_to([run.control], run.config.save_dtype):
            if result.stopped:
                write_files(run)
                print(stopped_message(result, trainer.config.steps, run.out), flush=True)
            else:
                print(_final_message(write_results(run, result), run.out), flush=True)


def generate_controlled(config: ControlGenerateConfig) -> list[Path]:
    """Generates images conditioned on maps or images, with any further adapters, and writes one PNG per image.

    Raises:
        VeneerError: a missing adapter, one that is incompatible with the base model, or images that do not match the adapters.
    """
    adapters = [parse_adapter(text) for text in config.adapter]
    base = config.base or next((found for path, _ in adapters if (found := base_of(path))), "bundled")
    note_missing_adapters([path for path, _ in adapters])
    return generate_with_control(config, adapters, base)


def _attach(config: ControlConfig, pipe: Any, reads: Embedder | None) -> tuple[Attachment, list[str]]:
    """The attachment, and what was changed in the weights of its initial adapter."""
    method = config.build_method()
    if reads is not None and "width" not in config.options.get(config.method, {}):
        method = type(method).from_config({**method.config(), "width": reads.width})
    torch.manual_seed(mix(config.seed, "adapters", method.name))
    initial = None if config.init_from is None else read_initial(pipe, config.init_from, [method])
    attached = attach(pipe, method, train=config.train or ())
    changes = [] if initial is None else initial.load_into([attached])
    return attached, [f"init-from: {change}" for change in changes]


def _condition_input(config: ControlConfig, reads: Embedder | None) -> MapInput | ImageEmbeddingInput:
    if reads is not None:
        return ImageEmbeddingInput(reads, config.image_dropout, config.seed)
    return MapInput(maps.get(str(config.condition)))


def _guide(images: TrainingImages) -> Any:
    """Reads the map file of a photo, resized as the photo is."""

    def read(photo: Photo, size: tuple[int, int]) -> Image.Image:
        return resize_map(read_photo(images.guides[photo.path]), size[::-1])

    return read


def _subjects(config: ControlConfig, images: TrainingImages, side: int) -> list[Subject]:
    """The held-out images, cropped to squares, with their maps."""
    condition, found = maps.get(str(config.condition)), []
    for photo in images.held:
        square = functools.partial(_square, side=side)
        image = square(read_photo(photo.path))
        if photo.path in images.guides:
            guide = square(resize_map(read_photo(images.guides[photo.path]), photo.size[::-1]))
        else:
            guide = condition(image) if condition.is_computed else image
        caption = "" if config.uses_image_embeddings else photo.caption or ""  # only the image embedding describes the content
        found.append(Subject(caption, image, guide))
    return found


def _square(image: Image.Image, side: int) -> Image.Image:
    """The center square of an image, resized."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)


def _generation_progress(config: ControlConfig, report: PhaseReport) -> Callable[[int, int], None] | None:
    """Progress callback for the training images that the base model generates if there is no data folder."""
    return None if config.data is not None else report("class_images", generated_count(config)).reach


def _plan(run: ControlRun, images: TrainingImages, steps: int) -> str:
    """Summary of the training run before it starts."""
    config, parameters = run.config, sum(p.numel() for p in run.control.parameters())
    lines = [
        f"{config.method} with condition {config.condition} on {config.base}: {parameters:,} trainable parameters; see "
        f"{run.out / 'maps.png'}",
        f"{len(images.train)} training images, {len(images.held)} held out for evaluation; {steps:,} steps of "
        f"{(config.batch or 1) * config.gradient_accumulation_steps} images, learning rate {config.learning_rate:g}",
    ]
    return "\n".join(lines)


def _final_message(record: dict[str, Any], out: Path) -> str:
    metrics = record["metrics"]
    if metrics is None:
        return f"{out}: written, not evaluated\n{_verdict(record)}"
    free, misled = (_difference(*metrics[name]) for name in ("over_free", "over_misled"))
    return (
        f"{metrics['measure']}: {metrics['followed']:.3f} with the condition, {metrics['free']:.3f} without ({free}), "
        f"{metrics['misled']:.3f} with another image's condition ({misled}); results in {out}\n"
        f"{_verdict(record)}"
    )


def _verdict(record: dict[str, Any]) -> str:
    return read_verdict(record).text()


def _difference(difference: float, half: float | None) -> str:
    """A mean difference and half its 95 % interval."""
    return f"{difference:+.3f}" if half is None else f"{difference:+.3f} ± {half:.3f}"


if __name__ == "__main__":
    from veneer.cli import main

    sys.exit(main(["control", *sys.argv[1:]]))
