"""Two processes that train, with a sharded base model and with a replicated one, for `test_sharded_base.py`.

On each process of `accelerate launch --multi_gpu --num_processes 2`, `main(FOLDER)` runs the jobs below one after the other and
writes gradients, files of runs and, for each process, `facts-0.json` and `facts-1.json` into the folder.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from veneer.pipelines.control import ControlConfig, control
from veneer.pipelines.personalize import PersonalizeConfig, personalize
from veneer.pipelines.transfer import TransferConfig, transfer

import veneer
from tests.classification.small import image_folder, model_folder
from tests.training.images import save
from veneer.injection import Attachment, HostChanged
from veneer.testing.pipelines import tiny_pipeline
from veneer.training import param_groups, prepare_base
from veneer.training.data.captions import Captions
from veneer.training.data.dataset import PhotoDataset
from veneer.training.data.photo_folder import find_photos
from veneer.training.families import family
from veneer.training.loop.sharded_base import ShardedBase
from veneer.training.loop.trainer import TrainConfig, Trainer
from veneer.training.objective.denoising_loss import DenoisingLoss
from veneer.training.preflight.estimates import estimate


@dataclass(frozen=True)
class Case:
    """One gradient: a method on a tiny pipeline; `batch` photos over all processes."""

    family: str
    method: str
    batch: int = 3
    where: tuple[str, ...] | None = None
    checkpointing: bool = False


CASES = {
    "lora": Case("sd", "lora"),
    "dora": Case("sd", "dora", where=("attn", "text/attn"), checkpointing=True),
    "token": Case("sd", "textual_inversion"),
    "idle process": Case("sd", "lora", batch=1),
    "hidden states by class": Case("sdxl", "lora", where=("attn", "text*/attn")),
    "blocks that return views": Case("flux", "lora", checkpointing=True),
}

PERSONALIZE: dict[str, Any] = {
    "concept": "<toy>", "class_word": "cat", "method": "pivotal", "template": ("a {concept}",), "prompts": ("a {concept}",),
    "drift_prompts": ("a cat",), "batch": 3, "steps": 4, "checkpoint_every": 2, "preview_every": 2, "class_images": 2,
    "eval_seeds": 1, "optimizer": "sgd", "learning_rate": 0.1, "text_encoder": True, "tracker": "none",
}  # fmt: skip
CONTROL: dict[str, Any] = {
    "method": "controlnext", "template": "a photo", "batch": 1, "steps": 2, "preview_every": 2, "eval_seeds": 1,
    "optimizer": "sgd", "learning_rate": 0.1, "tracker": "none",
}  # fmt: skip


def inputs(folder: Path) -> None:
    """Writes what all jobs read: three photos and a base model; images of three colors and a ViT."""
    for i in range(3):
        save(folder / "photos" / f"{i}.png", 48, 40, seed=i)
    tiny_pipeline("sd").save_pretrained(folder / "base")
    (folder / "base" / "veneer.json").write_text('{"steps": 2}')
    image_folder(folder / "colors", count=8)
    model_folder(folder / "models", "vit")


def personalized(folder: Path, name: str, **settings: Any) -> Path:
    """A run of `personalize` on the inputs."""
    config = {**PERSONALIZE, "photos": folder / "photos", "base": str(folder / "base"), "out": folder / name, **settings}
    return personalize(PersonalizeConfig(**config))


def controlled(folder: Path, name: str, **settings: Any) -> Path:
    """A run of `control train` on the inputs."""
    config = {**CONTROL, "data": folder / "photos", "base": str(folder / "base"), "out": folder / name, **settings}
    return control(ControlConfig(**config))


def transferred(folder: Path, name: str) -> Path:
    """A run of `transfer` on the inputs: an adapter and a head."""
    config: dict[str, Any] = {"shots": 3, "steps": 3, "batch": 5, "optimizer": "sgd", "learning_rate": 0.01, "augment": "none"}
    inputs = {"data": str(folder / "colors"), "model": str(folder / "models" / "vit")}
    return transfer(TransferConfig(method="lora", out=folder / name, workers=1, **inputs, **config))


def gradients(case: Case, photos: Path, shard: bool) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """The gradient of a step by parameter, from adapters off their initial values; and, of a sharded base model, the bytes on
    this process, those of the whole, and those of the largest unit, which is gathered at once."""
    accelerator = Accelerator(cpu=True)
    pipe = tiny_pipeline(case.family)
    prepare_base.freeze(pipe)
    kind = family(pipe)
    options = {"tokens": "<toy>", "initialize": "cat"} if case.method == "textual_inversion" else {}
    torch.manual_seed(0)
    attached = veneer.attach(pipe, case.method, where=case.where, **options)
    stir(attached)
    if case.checkpointing:
        prepare_base.enable_gradient_checkpointing(kind.tower)
    config = TrainConfig(batch=case.batch, tracker="none")
    side = min(kind.resolution, 64)  # FLUX has 512
    dataset = PhotoDataset(find_photos(photos), side, kind.multiple, 0, captions=Captions("<toy>"))
    loss = DenoisingLoss(kind, dataset, 0, config.samples)
    base = ShardedBase(accelerator, [kind.tower, *kind.text_towers.values()]) if shard else None
    groups = param_groups.parameter_groups([attached], {case.method: 1.0}, 1.0, 1.0)
    named = param_groups.named_parameters([attached])
    trainer = Trainer(config, groups, loss, named, accelerator=accelerator, base=base)
    trainer.gradients.compute(0, False)
    found = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
    return found, () if base is None else (*base.bytes(), max(map(unit_bytes, base.units)))


def unit_bytes(unit: Any) -> int:
    """Bytes of the frozen weights of a sharded module, without those of the units in it."""
    inner = {
        id(p) for module in unit.modules() if isinstance(module, FSDPModule) and module is not unit for p in module.parameters()
    }
    return sum(p.numel() * p.element_size() for p in unit.parameters() if not p.requires_grad and id(p) not in inner)


def memory(shard: bool) -> tuple[int, int]:
    """The estimated bytes of the base model and of activations, on this process."""
    pipe = tiny_pipeline("sd")
    prepare_base.freeze(pipe)
    kind, attached = family(pipe), veneer.attach(pipe, "lora")
    if shard:
        ShardedBase(Accelerator(cpu=True), [kind.tower])
    cost = estimate([attached], TrainConfig(tracker="none"), kind, kind.resolution, 1, 1, ["a cat"], True)
    return cost.base, cost.activations


def stir(attached: Attachment) -> None:
    """Adds the same noise to the parameters of an attachment on every process."""
    for number, parameter in enumerate(attached.parameters()):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))


def attached_pipe() -> tuple[Any, Attachment]:
    """A pipeline with adapters off their initial values."""
    pipe = tiny_pipeline("sd")
    torch.manual_seed(0)
    attached = veneer.attach(pipe, "lora", rank=2)
    stir(attached)
    return pipe, attached


def shard_everything(folder: Path) -> dict[str, Any]:
    """Shards a whole UNet, adapters included, by `fully_shard`; saves and loads them, and tries what is an error then."""
    pipe, attached = attached_pipe()
    for block in pipe.unet.down_blocks:
        fully_shard(block)
    fully_shard(pipe.unet)
    parts = sum(parameter.to_local().numel() for parameter in attached.parameters())
    attached.save(folder / "everything.safetensors")
    facts: dict[str, Any] = {"parts": parts, "parameters": sum(p.numel() for p in attached.parameters())}
    for name, call in {"attach": partial(veneer.attach, pipe, "lora", name="late"), "merge": attached.merge}.items():
        try:
            call()
        except HostChanged as error:
            facts[name] = [error.where, error.given]
    attached.load_state_dict({name: tensor + 1 for name, tensor in attached.state_dict().items()})
    attached.save(folder / "loaded.safetensors")
    attached.detach()
    return facts


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank, facts = accelerator.process_index, dict[str, Any]()
    for name, case in CASES.items():
        found, facts[name] = gradients(case, folder / "photos", shard=True)
        if accelerator.is_main_process:
            save_file(found, folder / f"{name}.safetensors")
    facts["memory"] = memory(shard=True)
    facts["everything"] = shard_everything(folder)
    personalized(folder, "replicated")
    personalized(folder, "sharded", shard_base=True)
    if accelerator.is_main_process:
        rewind(folder / "one", folder / "continued")
    accelerator.wait_for_everyone()
    personalized(folder, "continued", shard_base=True, resume=True)
    controlled(folder, "control-sharded", shard_base=True)
    transferred(folder, "transfer-two")
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    accelerator.wait_for_everyone()


def rewind(run: Path, copy: Path) -> None:
    """Copies a finished run as it was after its first checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(max(copy.glob("checkpoint-*")))
    for file in (*copy.glob("*.safetensors"), copy / "result.json"):
        file.unlink()
