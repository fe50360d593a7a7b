"""Fine-tune a diffusion base model on a subject or style from a few photos."""

from __future__ import annotations

import contextlib
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from veneer.base_models.schedulers import other_scheduler
from veneer.config_file import CONFIG, ConfigWriter
from veneer.injection import Attachment
from veneer.prompt_search import photo_prompt
from veneer.training import attach_methods, param_groups, prepare_base
from veneer.training.adapter_trainer import adapter_trainer
from veneer.training.base_sharding import is_sharding, load_base, shard_base, sharding_note
from veneer.training.block_learning_rates import with_block_rates
from veneer.training.concepts.concept import concepts_of, rename_concepts, token_options
from veneer.training.data.class_images import base_digest
from veneer.training.data.dataset import PhotoDataset
from veneer.training.data.photo_checks.findings import dataset_findings
from veneer.training.data.photo_folder import Photo
from veneer.training.data.run_photos import RunPhotos, check_mentions, read_photos
from veneer.training.encoder_offload import offload_encoders
from veneer.training.evaluation.adapter_output import write_files
from veneer.training.evaluation.personalization_run import PersonalizationRun
from veneer.training.evaluation.plan import affordable_plan
from veneer.training.families import Family, family
from veneer.training.fixed_adapters import attach_fixed, read_fixed, source_identity
from veneer.training.initial_adapter import read_initial
from veneer.training.loop.distributed import on_main
from veneer.training.loop.trainer import Trainer, TrainResult
from veneer.training.objective.denoising_loss import DenoisingLoss
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.personalization_data import PersonalizationData
from veneer.training.preflight.memory_check import check_memory
from veneer.training.preflight.preflight import preflight
from veneer.training.report.artifacts import (
    final_message,
    write_preview,
    write_results,
)
from veneer.training.report.phases import PhaseReport, report_of_run
from veneer.training.report.progress import ProgressLine
from veneer.training.report.run_folder import SHARDS, discard_unused, run_folder, stopped_message
from veneer.training.save_dtype import rounded_to
from veneer.training.validation import Validation

if TYPE_CHECKING:
    from veneer.training.loop.optimizers import ParameterGroup
    from veneer.training.loop.sharded_base import ShardedBase

__all__ = ["PersonalizeConfig", "personalize"]


def personalize(config: PersonalizeConfig, accelerator: Accelerator | None = None) -> Path:
    """Trains, and writes `adapter.safetensors`, `pytorch_lora_weights.safetensors` and `learned_embeds.safetensors` (if the
    methods have such weights), `before_after.png` and `result.json`. With the method `pez` it searches a prompt instead, and
    writes `prompt.txt`.

    Returns:
        The folder with the results.
    Raises:
        VeneerError: invalid options or photos, or with `check` too little memory; nothing has been trained.
        Diverged: the loss is no longer finite; the last weights with a finite loss are in the folder.
    """
    if config.method == photo_prompt.METHOD:
        return photo_prompt.search_photo_prompt(config, partial(print, flush=True))
    if config.check is not None:
        return _check(config)
    cpu = not torch.accelerator.is_available()  # without it, accelerate ignores the other torchrun processes on a CPU
    accelerator = accelerator or Accelerator(cpu=cpu)
    config = on_main(accelerator, config.with_defaults)
    with discard_unused(config.out):
        return _run(config, accelerator)


def _check(config: PersonalizeConfig) -> Path:
    """Prints the predicted memory; writes nothing."""
    memory = check_memory(config)
    print(memory.table(), flush=True)
    memory.check()
    print(memory.verdict(), flush=True)
    return Path()


def _run(config: PersonalizeConfig, accelerator: Accelerator) -> Path:
    out = run_folder(config.out, config.resume, config.photos)
    on_step = ConfigWriter(out / CONFIG, "personalize", config, ProgressLine())
    data = _load(config, out, accelerator)
    attached, generated, base = _attach_and_shard(data)
    config, loop = data.config, data.config.loop()
    loss = data.loss(generated, attached)
    few = accelerator.num_processes == 1 or base is not None
    if config.offload_encoders and accelerator.device.type != "cpu" and few and loss.caches_all:
        _cache_and_offload(config, data.model, loss, loop.steps, data.report)
    groups = param_groups.parameter_groups(attached, config.rates(), config.text_rate(), loop.learning_rate)
    groups = with_block_rates(groups, attached, config.block_lr)
    photos, pipe = data.photos.photos, data.model.pipe
    run = PersonalizationRun(
        config, pipe, attached, photos, out, data.report, base=base, subjects=data.subjects, fixed=data.fixed
    )
    run = _preflight(data, run, groups, loss.dataset)
    if config.dry_run:
        shutil.rmtree(out / SHARDS, ignore_errors=True)
        with contextlib.suppress(OSError):  # removes only an empty folder
            out.rmdir()
        return out

    identity = {**config.identity(), **source_identity(config.init_from, data.fixed)}
    validation = Validation.of_run(data.photos, data.source, loss, config, out, accelerator, sharded=base is not None)
    trainer = adapter_trainer(
        attached,
        validation.loss_step if validation else loss,
        loop,
        groups,
        out,
        identity={**identity, "base": data.digest, "photos": [p.digest for p in (*photos, *loss.dataset.prior_photos)]},
        accelerator=accelerator,
        base=base,
        on_step=validation.after(on_step) if validation else on_step,
        on_preview=lambda step: write_preview(run, step),
    )
    result = trainer.fit(config.resume)
    on_main(accelerator, lambda: _finish(run, trainer, result, validation), base)
    return out


def _load(config: PersonalizeConfig, out: Path, accelerator: Accelerator) -> PersonalizationData:
    """Reads the photos and loads the base model."""
    photos = read_photos(config, config.validation_share, config.seed, out / SHARDS)
    report = report_of_run(out, accelerator.is_main_process, config.dry_run)
    report("loading")
    pipe = load_base(config, accelerator)
    prepare_base.freeze(pipe)
    other_scheduler(pipe.scheduler, config.preview_scheduler)  # rejects one that does not fit
    fixed = read_fixed(config.with_)
    attach_fixed(pipe, fixed)
    model = family(pipe, truncate=config.truncate)
    config, photos = _named(config.with_captions(labels=not model.text_towers), model, photos, accelerator)
    if config.datasets:
        check_mentions(photos)
    return PersonalizationData(config, model, photos, out, report, accelerator, base_digest(model), fixed)


def _attach_and_shard(data: PersonalizationData) -> tuple[list[Attachment], list[Photo], ShardedBase | None]:
    """Attaches the methods, shards the base model, and generates the class images without adapters. Returns the attachments, the
    generated class images, and the sharded base model."""
    config, pipe = data.config, data.model.pipe
    sharding = is_sharding(config, data.accelerator)
    generated = [] if sharding else data.class_images()
    attached = _attach(config, pipe, data.accelerator.is_main_process)
    if config.gradient_checkpointing:
        prepare_base.checkpoint_towers(pipe, attached)
    base = shard_base(config, data.model, data.accelerator)
    if (note := sharding_note(config, base)) and data.accelerator.is_main_process:
        print(note, flush=True)
    if sharding:
        with contextlib.ExitStack() as disabled:
            for attachment in attached:
                disabled.enter_context(attachment.enabled(False))
            generated = data.class_images(base)
    data.report.close()
    return attached, generated, base


def _preflight(
    data: PersonalizationData, run: PersonalizationRun, groups: list[ParameterGroup], dataset: PhotoDataset
) -> PersonalizationRun:
    """Prints the checks of a run and its estimated cost. Returns the run with the evaluation that fits its training.

    Raises:
        PreflightError: the run cannot work.
    """
    config, loop = data.config, data.config.loop()
    texts = [text for source in dataset.sources for text in source.texts()]
    checks = preflight(
        run.attached,
        loop,
        [*dataset.photos, *dataset.prior_photos],
        data.model,
        config.concept,
        resolution=data.largest_resolution,
        prompts=[*texts, *run.prompts, *(config.drift_prompts or ())],
        groups=groups,
        default_rates=config.default_rates(),
        processes=data.accelerator.num_processes,
        folder=data.out,
        images=run.evaluation.images(len(run.concepts)),
        previews=run.previews(loop.steps),
        sampling=run.settings(1),
        loading=data.report.elapsed,
        findings=dataset_findings(dataset, data.model.multiple) if data.accelerator.is_main_process else (),
    )
    run.extra["preflight"] = [concern.as_dict() for concern in checks.concerns]
    if config.eval == "auto" and checks.estimate is not None:
        cost, count = checks.estimate, len(run.concepts)
        chosen = affordable_plan(run.evaluation, cost.seconds * cost.steps, cost.image_seconds, count)
        images = chosen.images(count) + run.previews(loop.steps)
        run, checks = replace(run, chosen=chosen), replace(checks, estimate=replace(cost, images=images))
    if data.accelerator.is_main_process:
        print(checks.text(), flush=True)
        if run.evaluation.reason:
            print(f"evaluation: {run.evaluation.kind}, because {run.evaluation.reason}; --eval full for all", flush=True)
    checks.check()
    return run


def _finish(run: PersonalizationRun, trainer: Trainer, result: TrainResult, validation: Validation | None) -> None:
    """Writes the results of a finished run, or the weights so far of a stopped one."""
    if validation and not result.stopped:
        run.extra["validation"] = validation.finish(result.steps, run.notes)
    with trainer.averaged():
        if not result.stopped:
            param_groups.finalize(run.attached)
        with rounded_to(run.attached, run.config.save_dtype):
            if result.stopped:
                write_files(run)
                print(stopped_message(result, trainer.config.steps, run.out), flush=True)
            else:
                print(final_message(run, write_results(run, result)), flush=True)


def _named(
    config: PersonalizeConfig, model: Family, photos: RunPhotos, accelerator: Accelerator
) -> tuple[PersonalizeConfig, RunPhotos]:
    """The config and photos with a placeholder token for each concept that cannot be a new token itself."""
    with_tokens = config.with_token([tokenizer for tokenizer, _ in model.limits()] if model.text_towers else [])
    names = {old.token: new.token for old, new in zip(concepts_of(config), concepts_of(with_tokens), strict=True)}
    for name, token in names.items() if accelerator.is_main_process else ():
        if name != token:
            print(f"concept: {name!r} is not a new token for the base model; the trained token is {token}", flush=True)
            print(f"         use {token} in prompts", flush=True)
    return with_tokens, photos.with_texts(with_tokens, lambda text: rename_concepts(text, names))


def _cache_and_offload(config: PersonalizeConfig, model: Family, loss: DenoisingLoss, steps: int, report: PhaseReport) -> None:
    """Caches latents and text embeddings, and moves the encoders to the CPU if all fit into the cache."""
    if not config.dry_run:
        report("caching")
        complete = loss.fill_cache(steps)
        report.close()
    if config.dry_run or complete:
        offload_encoders([model.pipe.vae, *model.text_towers.values()])


def _attach(config: PersonalizeConfig, pipe: Any, main: bool) -> list[Attachment]:
    configs = attach_methods.build_methods(config.method, config.options, *token_options(concepts_of(config)))
    where = {m.name: config.where for m in configs if config.where and not attach_methods.trains_token_embeddings(m)}
    initial = None if config.init_from is None else read_initial(pipe, config.init_from, configs)
    attached = attach_methods.attach_all(pipe, configs, where, config.text_encoder, config.seed)
    for note in initial.load_into(attached) if initial else ():
        if main:
            print(f"init-from: {note}", flush=True)
    return attached


if __name__ == "__main__":
    from veneer.cli import main

    sys.exit(main(["personalize", *sys.argv[1:]]))
