"""Groups of flags in the help texts of commands that train, by the name of the field."""

from __future__ import annotations

GROUPS: dict[str, tuple[str, ...]] = {
    "model": (
        "base", "model", "weights",
    ),
    "data": (
        "datasets", "concept", "class_word", "class_images", "prior_loss_weight", "template", "caption_dropout",
        "tag_dropout", "keep_tokens", "shuffle_tags", "resolution", "crop", "flip", "buckets", "masks", "truncate",
        "protocol", "condition", "train", "generated_images", "image_dropout", "shots", "validation", "validation_share",
        "validation_every", "test", "split_seed", "augment", "squash", "size", "workers",
    ),
    "method": (
        "method", "methods", "where", "init_from", "with_", "text_encoder", "head", "templates", "lp_ft", "batch_norm",
        "baseline",
    ),
    "optimization": (
        "steps", "epochs", "batch", "gradient_accumulation_steps", "learning_rate", "text_learning_rate",
        "token_learning_rate", "schedule", "warmup", "cycles", "power", "min_lr_ratio", "block_lr", "optimizer",
        "optimizer_args", "weight_decay", "max_grad_norm", "ema", "label_smoothing", "class_weights", "mixup", "cutmix",
        "patience", "search", "search_epochs", "keep_epoch", "seed", "seeds", "first_seed",
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
        "preview_every", "preview_steps", "preview_scheduler", "prompts", "drift_prompts", "eval", "eval_seeds", "features",
        "strength", "grid_images", "tracker",
    ),
    "output": (
        "out", "save_dtype", "checkpoint_every", "resume", "dry_run",
    ),
}  # fmt: skip
"""Title to the fields of the group, in the order of the help text."""


def group_of(name: str) -> str | None:
    """Title of the group of a field, or None."""
    return next((title for title, names in GROUPS.items() if name in names), None)
