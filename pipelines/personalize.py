"""Fine-tune a diffusion base model on a subject or style from a few photos."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from veneer import base_models
from veneer.config_file import CONFIG, ConfigWriter
from veneer.injection import Attachment, OptionError
from veneer.training import attach_methods, param_groups, prepare_base
from veneer.training.adapter_trainer import adapter_trainer
from veneer.training.base_sharding import is_sharding, load_base, shard_base, sharding_note
from veneer.training.block_learning_rates import with_block_rates
from veneer.training.data.captions import Captions, rename_concept
from veneer.training.data.class_images import base_digest, generate_class_images
from veneer.training.data.dataset import PhotoDataset
from veneer.training.data.latent_cache import Cache
from veneer.training.data.photo_folder import Photo, find_photos
from veneer.training.encoder_offload import offload_encoders
from veneer.training.families import Family, family
from veneer.training.fixed_adapters import attach_fixed, source_identity
from veneer.training.initial_adapter import read_initial
from veneer.training.loop.distributed import on_main
from veneer.training.loop.trainer import Trainer, TrainResult
from veneer.training.objective.denoising_loss import DenoisingLoss, LossOptions
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.preflight.memory_check import check_memory
from veneer.training.preflight.preflight import preflight
from veneer.training.report.artifacts import (
    PersonalizationRun,
    count_evaluation_images,
    final_message,
    write_files,
    write_preview,
    write_results,
)
from veneer.training.report.phases import PhaseReport
from veneer.training.report.previews import sampling_scheduler
from veneer.training.report.progress import ProgressLine
from veneer.training.report.run_folder import discard_unused, run_folder, stopped_message
from veneer.training.save_dtype import rounded_to

if TYPE_CHECKING:
    from veneer.training.loop.sharded_base import ShardedBase

__all__ = ["PersonalizeConfig", "personalize"]


def personalize(config: PersonalizeConfig, accelerator: Accelerator | None = None) -> Path:
    """Trains, and writes `adapter.safetensors`, `pytorch_lora_weights.safetensors` and `learned_embeds.safetensors` (if the
    methods have such weights), `before_after.png` and `result.json`.

    Returns:
        The folder with the results.
    Raises:
        VeneerError: invalid options or photos, or with `check` too little memory; nothing has been trained.
        Diverged: the loss is no longer finite; the last weights with a finite loss are in the folder.
    """
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
    photos = find_photos(config.photos or "", concept=config.concept)
    main = accelerator.is_main_process
    report = PhaseReport(None if config.dry_run else out / "progress.jsonl", sys.stderr) if main else PhaseReport()
    on_step = ConfigWriter(out / CONFIG, "personalize", config, ProgressLine())
    report("loading")
    pipe = load_base(config, accelerator)
    prepare_base.freeze(pipe)
    sampling_scheduler(pipe.scheduler, config.preview_scheduler)
    attach_fixed(pipe, config.with_)
    model = family(pipe, truncate=config.truncate)
    config, photos = _named(config.with_captions(labels=not model.text_towers), model, photos, accelerator)
    digest = base_digest(model)
    resolution = config.resolution or model.resolution
    sharding = is_sharding(config, accelerator)
    prior = [] if sharding else _prior(config, model, out, accelerator, report, digest)

    attached = _attach(config, pipe, main)
    if config.gradient_checkpointing:
        prepare_base.checkpoint_towers(pipe, attached)
    base = shard_base(config, model, accelerator)
    if (note := sharding_note(config, base)) and main:
        print(note, flush=True)
    if sharding:
        with contextlib.ExitStack() as disabled:
            for attachment in attached:
                disabled.enter_context(attachment.enabled(False))
            prior = _prior(config, model, out, accelerator, report, digest, base)
    report.close()
    captions = _captions(config)
    dataset = _dataset(config, model, photos, prior, captions, resolution)
    loop = config.loop()
    loss = DenoisingLoss(
        model,
        dataset,
        config.seed,
        loop.samples,
        config.objective(),
        config.noise(),
        LossOptions(kind=config.loss, prior_weight=config.prior_loss_weight),
        Cache(config.cache_folder) if config.cache else None,
    )
    few = accelerator.num_processes == 1 or sharding
    if config.offload_encoders and accelerator.device.type != "cpu" and few and loss.caches_all:
        _cache_and_offload(config, model, loss, loop.steps, report)
    groups = param_groups.parameter_groups(attached, config.rates(), config.text_rate(), loop.learning_rate)
    groups = with_block_rates(groups, attached, config.block_lr)
    run = PersonalizationRun(config, pipe, attached, photos, out, report, base=base)
    texts = [template.replace("{concept}", config.concept) for template in captions.templates]
    checks = preflight(
        attached,
        loop,
        [*photos, *prior],
        model,
        config.concept,
        resolution=resolution,
        prompts=[*texts, *run.prompts, *(config.drift_prompts or ())],
        groups=groups,
        default_rates=config.default_rates(),
        processes=accelerator.num_processes,
        folder=out,
        images=count_evaluation_images(config),
        previews=run.previews(loop.steps),
        sampling=run.settings(1),
        loading=report.elapsed,
    )
    if main:
        print(checks.text(), flush=True)
    checks.check()
    if config.dry_run:
        with contextlib.suppress(OSError):  # removes only an empty folder
            out.rmdir()
        return out

    identity = {**config.identity(), **source_identity(config.init_from, config.with_)}
    trainer = adapter_trainer(
        attached,
        loss,
        loop,
        groups,
        out,
        identity={**identity, "base": digest, "photos": [p.digest for p in [*photos, *prior]]},
        accelerator=accelerator,
        base=base,
        on_step=on_step,
        on_preview=lambda step: write_preview(run, step),
    )
    result = trainer.fit(config.resume)
    on_main(accelerator, lambda: _finish(run, trainer, result), base)
    return out


def _finish(run: PersonalizationRun, trainer: Trainer, result: TrainResult) -> None:
    """Writes the results of a finished run, or the weights so far of a stopped one."""
    with trainer.averaged(), rounded_to(run.attached, run.config.save_dtype):
        if result.stopped:
            write_files(run)
            print(stopped_message(result, trainer.config.steps, run.out), flush=True)
        else:
            print(final_message(run, write_results(run, result)), flush=True)


def _named(
    config: PersonalizeConfig, model: Family, photos: list[Photo], accelerator: Accelerator
) -> tuple[PersonalizeConfig, list[Photo]]:
    """The config and photos with a placeholder token as the concept, if the concept itself cannot be a new token."""
    named = config.with_token([tokenizer for tokenizer, _ in model.limits()] if model.text_towers else [])
    if named.concept == config.concept:
        return config, photos
    if accelerator.is_main_process:
        print(
            f"concept: {config.concept!r} is not a new token for the base model; the trained token is {named.concept}", flush=True
        )
        print(f"         use {named.concept} in prompts", flush=True)
    return named, [
        dataclasses.replace(p, caption=p.caption and rename_concept(p.caption, config.concept, named.concept)) for p in photos
    ]


def _prior(
    config: PersonalizeConfig, model: Family, out: Path, accelerator: Accelerator, report: PhaseReport, digest: str,
    base: ShardedBase | None = None,
) -> list[Photo]:  # fmt: skip
    """Class images, generated by the base model in the main process."""
    if not config.class_images:
        return []
    if not config.class_word:
        message = "--class-images needs --class-word: the class of the subject, such as 'toy'."
        raise OptionError(message, option="class_word", given="")
    preset = base_models.preset(config.base)
    prompt = config.prior_prompt()

    def make() -> list[Path]:
        count = report("class_images", config.class_images)
        return generate_class_images(
            model, out / "prior", prompt, config.class_images, config.seed, base=digest, progress=count.reach,
            num_inference_steps=preset.steps, guidance_scale=preset.guidance_scale,
        )  # fmt: skip

    paths = on_main(accelerator, make, base)
    return [find_photos(path, is_prior=True)[0] for path in paths]


def _cache_and_offload(config: PersonalizeConfig, model: Family, loss: DenoisingLoss, steps: int, report: PhaseReport) -> None:
    """Caches latents and text embeddings, and moves the encoders to the CPU if all fit into the cache."""
    if not config.dry_run:
        report("caching")
        complete = loss.fill_cache(steps)
        report.close()
    if config.dry_run or complete:
        offload_encoders([model.pipe.vae, *model.text_towers.values()])


def _attach(config: PersonalizeConfig, pipe: Any, main: bool) -> list[Attachment]:
    configs = attach_methods.build_methods(config.method, config.options, config.concept, config.class_word)
    where = {m.name: config.where for m in configs if config.where and not attach_methods.trains_token_embeddings(m)}
    initial = None if config.init_from is None else read_initial(pipe, config.init_from, configs)
    attached = attach_methods.attach_all(pipe, configs, where, config.text_encoder, config.seed)
    for note in initial.load_into(attached) if initial else ():
        if main:
            print(f"init-from: {note}", flush=True)
    return attached


def _dataset(
    config: PersonalizeConfig, model: Family, photos: list[Photo], prior: list[Photo], captions: Captions, resolution: int
) -> PhotoDataset:
    return PhotoDataset(
        photos,
        resolution,
        model.multiple,
        config.seed,
        captions=captions,
        flip=config.flip,
        crop=config.crop,
        buckets=config.buckets and not model.square,
        masks=config.masks,
        prior_photos=prior,
    )


def _captions(config: PersonalizeConfig) -> Captions:
    return Captions(
        concept=config.concept,
        prior=config.prior_prompt(),
        templates=config.template or ("{concept}",),
        dropout=config.caption_dropout,
        tag_dropout=config.tag_dropout,
        shuffle=config.shuffle_tags,
        keep_tokens=config.keep_tokens,
    )


if __name__ == "__main__":
    from veneer.cli import main

    sys.exit(main(["personalize", *sys.argv[1:]]))
