"""Training arguments of sd-scripts, as in a file for `--config_file`: options of a run.

Tables of the file only group the arguments, as in sd-scripts.
Source: kohya-ss/sd-scripts, docs/train_network.md and docs/train_network_advanced.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .kohya_datasets import OMISSIONS as DATASET_OMISSIONS
from .kohya_datasets import SHARED, convert_datasets, side_of
from .kohya_omissions import IMPLIED, OMISSIONS
from .run_options import pairs_of, set_optimizer, set_sampler, set_schedule, set_timesteps
from .source_table import RunContent, SourceTable

PLAIN = {
    "pretrained_model_name_or_path": "base",
    "max_train_steps": "steps",
    "train_batch_size": "batch",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "mixed_precision": "mixed_precision",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "min_snr_gamma": "min_snr_gamma",
    "noise_offset": "noise_offset",
    "multires_noise_discount": "pyramid_noise",
    "ip_noise_gamma": "input_perturbation",
    "prior_loss_weight": "prior_loss_weight",
    "sample_every_n_steps": "preview_every",
    "cache_latents": "cache",
    "lr_scheduler_num_cycles": "cycles",
    "lr_scheduler_power": "power",
    "lr_scheduler_min_lr_ratio": "min_lr_ratio",
    "network_weights": "init_from",
}
"""Argument to the option of the same meaning and type."""
FLOATS = (
    "max_grad_norm", "min_snr_gamma", "noise_offset", "pyramid_noise", "input_perturbation", "prior_loss_weight", "power",
    "min_lr_ratio",
)  # fmt: skip
SAVE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32"}
NETWORKS = {
    "lora": "lora",
    "lora_flux": "lora",
    "lora_sd3": "lora",
    "lora_fa": "lora_fa",
    "loha": "loha",
    "lokr": "lokr",
    "oft": "oft",
}
"""Module in `networks` to the method."""
ALGORITHMS = {
    "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "ia3": "ia3", "(ia)^3": "ia3", "diag-oft": "oft",
    "boft": "boft", "glora": "glora",
}  # fmt: skip
"""Algorithm of LyCORIS to the method."""
SINGLE = ("train_data_dir", "reg_data_dir", "dataset_repeats")


def convert_arguments(content: Mapping[str, Any], folder: Path, target: RunContent, read: Any) -> None:
    """Converts a file of training arguments, and the dataset config that it names.

    Args:
        content: the file's content. `folder`: of the file, to which relative paths of other files refer.
        read: reads another TOML or JSON file.
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= value if isinstance(value, dict) else {key: value}
    source, options = SourceTable(flat, "", target), target.options
    source.carry(PLAIN, options)
    options.update({name: float(options[name]) for name in FLOATS if name in options})
    for key in IMPLIED:
        source.take(key)
    _set_output(source, options)
    _set_network(source, target)
    _set_rates(source, options)
    set_optimizer(source, options, "optimizer_type", "optimizer_args")
    set_schedule(source, options, "lr_scheduler", "lr_warmup_steps", "lr_scheduler_args")
    set_sampler(source, options, "sample_sampler")
    _set_base_weights(source, options)
    set_timesteps(source, options, "timestep_sampling")
    _set_loss(source, options)
    _set_prompts(source, options, folder)
    _set_datasets(source, target, folder, read)
    if "max_train_epochs" in source:
        source.remark(
            "left_out", "max_train_epochs", "a run is measured in steps; set steps to epochs x images x repeats / batch"
        )
    source.explain(OMISSIONS)
    source.report_unknown()


def _set_output(source: SourceTable, options: dict[str, Any]) -> None:
    folder, name = source.take("output_dir"), source.take("output_name")
    if folder or name:
        options["out"] = str(Path(folder or "runs") / (name or "last"))
    if (precision := source.take("save_precision")) in SAVE_DTYPES:
        options["save_dtype"] = SAVE_DTYPES[precision]
    if (every := source.take("save_every_n_steps")) is not None:
        options["checkpoint_every"] = every
        source.remark("changed", "save_every_n_steps", "checkpoints to resume from, instead of adapter files")
    if source.take("save_model_as", "safetensors") != "safetensors":
        source.remark("left_out", "save_model_as", "files are safetensors")
    if source.take("fp8_base"):
        options["quantize"] = ["fp8"]
    if trackers := source.take("log_with"):
        options["tracker"] = {"all": "tensorboard,wandb"}.get(trackers, trackers)


def _set_network(source: SourceTable, target: RunContent) -> None:
    """Method, rank and alpha: the default alpha of sd-scripts is 1, so that it is always written."""
    module, arguments = str(source.take("network_module", "networks.lora")), dict(pairs_of(source.take("network_args", [])))
    algorithm = arguments.pop("algo", "lora") if module.startswith("lycoris") else module.rpartition(".")[2]
    method = (ALGORITHMS if module.startswith("lycoris") else NETWORKS).get(str(algorithm).lower())
    if method is None:
        source.remark("left_out", "network_module", f"no method {algorithm!r}; lora is used. veneer methods lists the methods")
        method = "lora"
    target.options["method"] = method
    if "network_module" in source and method in ("lora", "loha", "lokr"):
        reason = "sites are the method's default, and attention in text encoders; set where, such as attn, xattn, mlp and proj"
        source.remark("changed", "network_module", reason)
    options = target.methods.setdefault(method, {})
    rank, alpha = source.take("network_dim", 4), float(source.take("network_alpha", 1.0))
    if method in ("lora", "lora_fa", "loha", "lokr"):
        options |= {"rank": int(rank), "alpha": alpha}
    elif "network_dim" in source:
        source.remark("left_out", "network_dim", f"{method} has other options: see its page")
    dropout = source.take("network_dropout")
    if dropout and method == "lora":
        options["dropout"] = float(dropout)
    elif dropout:
        source.remark("left_out", "network_dropout", f"{method} has no dropout")
    _set_network_arguments(source, arguments, method, options)
    if not source.take("network_train_unet_only") and method not in ("ia3",):
        target.options["text_encoder"] = True


def _set_network_arguments(source: SourceTable, arguments: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    conv = {"rank": arguments.pop("conv_dim", None), "alpha": arguments.pop("conv_alpha", 1.0)}
    if conv["rank"] is not None and method in ("lora", "loha", "lokr"):
        options["by_site"] = {"conv.*": {"rank": int(conv["rank"]), "alpha": float(conv["alpha"])}}
        source.target.options["where"] = ["attn", "xattn", "mlp", "conv.*"]
    if method == "lokr" and "factor" in arguments:
        options["factor"] = int(arguments.pop("factor"))
    for name, value in arguments.items():
        source.content[f"network_args.{name}"] = value
        source.remark("left_out", f"network_args.{name}", f"{method} has no option for it here; see its page for the options")


def _set_rates(source: SourceTable, options: dict[str, Any]) -> None:
    rate, unet, text = (source.take(key) for key in ("learning_rate", "unet_lr", "text_encoder_lr"))
    if (main := unet if unet is not None else rate) is not None:
        options["learning_rate"] = float(main)
    if isinstance(text, list) and text:
        source.remark("changed", "text_encoder_lr", "all text encoders have the first rate")
        text = text[0]
    if options.get("text_encoder") and (text is not None or rate is not None):
        options["text_learning_rate"] = float(text if text is not None else rate)


def _set_base_weights(source: SourceTable, options: dict[str, Any]) -> None:
    """Adapters below the trained one, FILE:STRENGTH; without a multiplier the strength is 1."""
    files = source.take("base_weights", [])
    files = [files] if isinstance(files, str) else files
    if not files:
        return
    strengths = source.take("base_weights_multiplier", [])
    strengths = strengths if isinstance(strengths, list) else [strengths]
    if len(strengths) > len(files):
        source.remark("left_out", "base_weights_multiplier", f"{len(strengths)} for {len(files)} files; the last are left out")
    more = [1.0] * (len(files) - len(strengths))
    options["with"] = [f"{file}:{float(strength):g}" for file, strength in zip(files, [*strengths, *more], strict=False)]


def _set_loss(source: SourceTable, options: dict[str, Any]) -> None:
    kind = source.take("loss_type")
    if kind in ("l2", "huber", "smooth_l1"):
        options["loss"] = kind
    elif kind is not None:
        source.remark("left_out", "loss_type", "expected l2, huber or smooth_l1; l2 is used")
    if source.take("v_parameterization"):
        options["prediction"] = "v_prediction"


def _set_prompts(source: SourceTable, options: dict[str, Any], folder: Path) -> None:
    """Prompts of a text file, one a line, without their flags such as `--w 512`."""
    name = source.take("sample_prompts")
    if not name:
        return
    file = folder / name
    if not file.is_file() or file.suffix != ".txt":
        source.remark("left_out", "sample_prompts", "not a text file that exists; set prompts")
        return
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    options["prompts"] = [re.split(r"\s+--\w", line)[0] for line in lines if line and not line.startswith("#")]
    source.remark("changed", "sample_prompts", "prompts only; size, seed and sampler are the same for all; set preview_scheduler")


def _set_datasets(source: SourceTable, target: RunContent, folder: Path, read: Any) -> None:
    """The dataset config, or the folders of images by repeats and class tokens, `10_sks dog`."""
    defaults = {key: value for key in (*SHARED, *DATASET_OMISSIONS) if (value := source.take(key)) is not None}
    if "train_batch_size" in source:
        defaults.setdefault("batch_size", source.content["train_batch_size"])
    file = source.take("dataset_config")
    if file:
        convert_datasets(read(folder / file), target, defaults)
        return
    if "resolution" in source:
        target.options["resolution"] = side_of(source, "resolution", source.content["resolution"])
    subsets = []
    for key in SINGLE[:2]:
        path = source.take(key)
        folders = sorted((folder / path).glob("*_*")) if path else []
        for each in (each for each in folders if each.is_dir() and each.name.partition("_")[0].isdigit()):
            repeats, _, tokens = each.name.partition("_")
            more = {"is_reg": True} if key == "reg_data_dir" else {}
            subsets.append({"image_dir": str(each), "num_repeats": int(repeats), "class_tokens": tokens, **more})
        if path and not folders:
            source.remark("left_out", key, "no folders such as 10_sks dog in it on this machine; add datasets")
    source.take("dataset_repeats")
    if subsets:
        convert_datasets({"datasets": [{"subsets": subsets}]}, target, defaults)
    else:
        SourceTable({}, "", target).remark("missing", "datasets", "no images; add photos and concept, or [[datasets]] tables")
