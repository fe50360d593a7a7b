"""Groups of flags in the help texts of commands that train or generate, by the name of the field."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping

GROUPS: dict[str, tuple[str, ...]] = {
    "model": (
        "base", "model", "weights",
    ),
    "data": (
        "concept", "class_word", "class_images", "prior_loss_weight", "condition", "generated_images", "template",
        "caption_dropout", "image_dropout", "tag_dropout", "shuffle_tags", "keep_tokens", "truncate", "resolution", "crop",
        "flip", "buckets", "masks", "datasets", "multi_label", "more_data", "tasks", "task_temperature", "protocol",
        "base_to_new", "shots", "unlabeled", "validation", "validation_share", "validation_every", "test", "split_seed",
        "augment", "squash", "size", "workers",
    ),
    "method": (
        "method", "methods", "budget_parameters", "space", "sizes", "groups", "baseline", "baselines", "where",
        "target_modules", "method_where", "text_encoder", "head", "lp_ft", "templates", "batch_norm", "train", "init_from",
        "with_",
    ),
    "optimization": (
        "seeds", "first_seed", "steps", "epochs", "batch", "gradient_accumulation_steps", "learning_rate", "head_learning_rate",
        "text_learning_rate", "token_learning_rate", "schedule", "warmup", "cycles", "power", "min_lr_ratio", "block_lr",
        "layer_decay", "optimizer", "optimizer_args", "weight_decay", "max_grad_norm", "ema", "label_smoothing", "class_weights",
        "mixup", "cutmix", "patience", "search", "search_epochs", "trials", "population",
        "parents", "mutation", "supernet_epochs", "trial_epochs", "keep_epoch", "seed",
    ),
    "loss": (
        "loss", "loss_weighting", "min_snr_gamma", "timestep_sampling", "prediction", "noise_offset", "pyramid_noise",
        "input_perturbation",
    ),
    "memory and speed": (
        "dtype", "mixed_precision", "quantize", "gradient_checkpointing", "offload_encoders", "shard_base", "cache",
        "cache_folder", "check",
    ),
    "evaluation": (
        "preview_every", "prompts", "preview_steps", "preview_scheduler", "eval", "eval_seeds", "drift_prompts", "features",
        "strength", "grid_images", "tracker",
    ),
    "output": (
        "out", "save_dtype", "checkpoint_every", "resume", "dry_run",
    ),
}  # fmt: skip
"""Title to the fields of the group, in the order of the help text."""


GENERATION: dict[str, tuple[str, ...]] = {
    "model": ("adapter", "base"),
    "control": ("image", "map", "condition", "start", "end"),
    "images": (
        "images_per_prompt", "seed", "size", "steps", "guidance_scale", "negative_prompt", "scheduler", "side_by_side", "out",
    ),
    "memory and speed": ("device", "dtype", "quantize", "offload", "skip_layers"),
}  # fmt: skip
"""The groups of commands that generate images."""


def groups_of(names: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    """The groups for a command with these fields: `GENERATION` for one that generates images, else `GROUPS`."""
    return GENERATION if "guidance_scale" in names else GROUPS


def group_of(name: str, groups: Mapping[str, tuple[str, ...]] = GROUPS) -> str | None:
    """Title of the group of a field, or None."""
    return next((title for title, names in groups.items() if name in names), None)


def add_method_group(parser: argparse.ArgumentParser, method: str, about: str) -> argparse._ArgumentGroup:
    """Adds the group of a method's options, after the group `method` and those of methods before it.

    Args:
        about: first paragraph of the method's docstring, with its formula.
    """
    group = parser.add_argument_group(f"options of {method}", about)
    groups = parser._action_groups
    before = [place for place, each in enumerate(groups) if each.title == "method" or str(each.title).startswith("options of ")]
    groups.insert(max(place for place in before if groups[place] is not group) + 1, groups.pop())
    return group
