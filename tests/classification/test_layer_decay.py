"""Layer-wise learning-rate decay: the factor of every parameter against timm's `param_groups_layer_decay`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.optim import param_groups_layer_decay
from torch import nn

from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.data.run_data import Views, open_data
from veneer.classification.models.loading import open_classifier
from veneer.classification.train.attach_methods import attach_methods
from veneer.classification.train.layer_decay import with_layer_decay
from veneer.classification.train.train import ClassifierTrainer
from veneer.injection import Attachment, attach, hosts
from veneer.injection.errors import OptionError, SelectionError
from veneer.training.block_learning_rates import with_block_rates

from .small import image_folder, model_folder

DECAY = 0.5
SMALL = {"num_classes": 3}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, **SMALL}
CONVNEXT = {"depths": (1, 2, 2, 1), "dims": (8, 16, 24, 32), "kernel_sizes": 3, **SMALL}
NORM = ("norm.",)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", **VIT), NORM),
    "vit_norm_before_blocks": (lambda: timm.create_model("vit_tiny_patch16_224", pre_norm=True, **VIT), NORM),
    "vit_registers": (lambda: timm.create_model("vit_tiny_patch16_224", reg_tokens=2, global_pool="avg", **VIT), ()),
    "deit_distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **VIT), NORM),
    "convnext": (lambda: timm.create_model("convnext_tiny", **CONVNEXT), ()),
    "efficientnet": (hosts.get("timm_conv")().tiny()["efficientnet"], ("conv_head.", "bn2.")),
}
"""Model, and the start of the names of parameters with the rate of the head, to which timm gives that of the last block."""


def factors_of(groups: Sequence[Any], attached: Attachment) -> dict[str, float]:
    """Factor of each parameter, by the path of its site."""
    by_id = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    return {
        f"{getattr(site, 'path', site.name)}.{getattr(site, 'param', '')}".strip("."): by_id[id(p)]
        for site, adapter in attached.parts.values()
        for p in adapter.parameters()
    }


@pytest.mark.parametrize("kind", MODELS)
def test_full_fine_tuning_has_the_factors_of_timm(kind: str) -> None:
    build, as_head = MODELS[kind]
    model = build()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=DECAY)
    theirs = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    tuned = attach(model, "full", head_rate=1.0)
    ours = factors_of(with_layer_decay(tuned.groups(), [tuned], DECAY), tuned)  # type: ignore[arg-type]
    assert {theirs[name] for name in theirs if name.startswith(as_head or "-")} == ({DECAY} if as_head else set())
    assert ours == {**theirs, **{name: 1.0 for name in theirs if name.startswith(as_head or "-")}}
    assert min(ours.values()) < DECAY**3


def test_an_adapter_has_the_factor_of_its_block_and_the_head_the_full_rate() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    tuned = attach(model, "lora", rank=2, train=("head",))
    groups = with_layer_decay(tuned.groups(), [tuned], DECAY)  # type: ignore[arg-type]
    by_id = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for site, adapter in tuned.parts.values():
        assert {by_id[id(p)] for p in adapter.parameters()} == {DECAY ** (3 - (site.depth or 0))}
    assert {by_id[id(p)] for p in dict(tuned.trained.items()).values()} == {1.0}


def test_prompts_count_as_embeddings() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    prompts, lora = attach(model, "vpt", where="tokens.tower"), attach(model, "lora", rank=2)
    groups = with_layer_decay([*prompts.groups(), *lora.groups()], [prompts, lora], DECAY)  # type: ignore[list-item]
    ids = {id(p) for p in prompts.parameters()}
    assert {group["lr_scale"] for group in groups for p in group["params"] if id(p) in ids} == {DECAY**4}


def test_towers_count_their_own_blocks() -> None:
    model = hosts.get("clip_classifier")().tiny()["vit"]()
    tuned = attach(model, "bitfit", where="vision/bias text/bias")
    groups = with_layer_decay(tuned.groups(), [tuned], DECAY)  # type: ignore[arg-type]
    by_id = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for site, adapter in tuned.parts.values():
        if site.depth is not None:
            assert {by_id[id(p)] for p in adapter.parameters()} == {DECAY ** (2 - site.depth)}, site.name


def test_the_scale_of_the_logits_has_the_full_rate() -> None:
    """It is in a tower without blocks, behind the others."""
    model = hosts.get("open_clip")().tiny()["vit"]()
    tuned = attach(model, "full")
    factors = factors_of(with_layer_decay(tuned.groups(), [tuned], DECAY), tuned)
    assert factors["logit_scale"] == 1
    assert factors["visual.conv1.weight"] < 1


def test_it_multiplies_factors_of_blocks() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    tuned = attach(model, "lora", rank=2)
    groups = with_layer_decay(tuned.groups(), [tuned], DECAY)  # type: ignore[arg-type]
    groups = with_block_rates(groups, [tuned], {"*@1": 0.1})
    scales = {site.depth: {g["lr_scale"] for g in groups for p in g["params"] if any(p is q for q in adapter.parameters())}
              for site, adapter in tuned.parts.values()}  # fmt: skip
    assert scales == {0: {DECAY**3}, 1: {0.1 * DECAY**2}, 2: {DECAY}}


def test_the_default_leaves_the_groups_as_they_are() -> None:
    tuned = attach(timm.create_model("vit_tiny_patch16_224", **VIT), "fact")
    groups: list[Any] = tuned.groups()
    assert all(ours is theirs for ours, theirs in zip(with_layer_decay(groups, [tuned], 1.0), groups, strict=True))


def test_blocks_that_share_a_parameter_are_an_error() -> None:
    tuned = attach(timm.create_model("vit_tiny_patch16_224", **VIT), "fact")
    with raises(SelectionError, where="layer_decay"):
        with_layer_decay(tuned.groups(), [tuned], DECAY)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, float("nan")])
def test_the_decay_is_above_zero_and_at_most_one(decay: float) -> None:
    with raises(OptionError, option="layer_decay"):
        TransferConfig(layer_decay=decay)


def trainer_of(tmp_path: Path, **options: Any) -> tuple[ClassifierTrainer, Views]:
    folder, images = model_folder(tmp_path, "vit"), image_folder(tmp_path / "images")
    config = TransferConfig(data=str(images), model=str(folder), out=tmp_path / "run", epochs=1, batch=8, **options)
    data = open_data(config, tmp_path)
    classifier = open_classifier(config.model, data.classes)
    views = Views(data, classifier.data, "none")
    attached = attach_methods(classifier, config, data)
    return ClassifierTrainer(classifier, attached, views, config, tmp_path / "run", Accelerator(cpu=True)), views


def test_a_run_trains_early_blocks_with_lower_rates(tmp_path: Path) -> None:
    """One step of SGD: the update of a block relative to a run without decay is its factor."""
    moves = {}
    for decay in (1.0, DECAY):
        options = {"optimizer": "sgd", "optimizer_args": {"momentum": "0", "nesterov": "False"}, "weight_decay": 0.0}
        trainer, views = trainer_of(
            tmp_path / str(decay), method="bitfit", layer_decay=decay, steps=1, schedule="constant", warmup=0, **options
        )
        with views:
            before = {name: p.detach().clone() for name, p in trainer.named.items()}
            trainer.train()
        moves[decay] = {name: p.detach() - before[name] for name, p in trainer.named.items()}
    sites = {f"{a.name}/{name}": site for a in trainer.attached for name, (site, _) in a.parts.items()}
    depths = {name: sites[name.rpartition(":")[0]].depth for name in moves[1.0]}
    assert {0, 1, None} <= set(depths.values())
    for name, move in moves[1.0].items():
        if depths[name] is not None:
            torch.testing.assert_close(moves[DECAY][name], move * DECAY ** (2 - depths[name]))


def test_a_run_without_parameters_in_blocks_is_an_error(tmp_path: Path) -> None:
    with raises(OptionError, option="layer_decay", given=0.75):
        trainer_of(tmp_path, method="linear_probe", layer_decay=0.75)


def test_a_resumed_run_needs_the_same_decay() -> None:
    assert TransferConfig(layer_decay=0.75).identity() != TransferConfig().identity()
