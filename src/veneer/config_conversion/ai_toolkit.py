"""Job configs of ai-toolkit: the first process of a training job as options of a run.

`[trigger]` in prompts and templates becomes the concept. ai-toolkit puts the trigger word before prompts and captions without it;
so does the converted config, unless all caption files on this machine contain it.
Source: ostris/ai-toolkit, config/examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.injection.errors import OptionError

from .ai_toolkit_omissions import IMPLIED, OMISSIONS
from .run_options import set_optimizer, set_sampler, set_schedule, set_timesteps
from .source_table import RunContent, SourceTable

SECTIONS = ("network", "save", "datasets", "train", "model", "sample", "logging")
TRAIN = {
    "steps": "steps",
    "batch_size": "batch",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "train_text_encoder": "text_encoder",
}
TRAIN_FLOATS = {
    "min_snr_gamma": "min_snr_gamma", "noise_offset": "noise_offset", "max_grad_norm": "max_grad_norm", "lr": "learning_rate",
}  # fmt: skip
DATASET = {
    "num_repeats": "repeats",
    "is_reg": "regularization",
    "caption_dropout_rate": "caption_dropout",
    "token_dropout_rate": "tag_dropout",
    "shuffle_tokens": "shuffle_tags",
    "keep_tokens": "keep_tokens",
    "alpha_mask": "masks",
    "buckets": "buckets",
}
"""Key of a dataset to the option of a dataset table."""
METHODS = {"lora": "lora", "locon": "lora", "lokr": "lokr", "dora": "dora"}
DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "fp32": "float32",
    "float32": "float32",
}
EPSILON = {name: {"eps": 1e-6} for name in ("adam", "adamw", "adam8bit", "adamw8bit", "ademamix8bit", "prodigy", "dadapt_adam")}
"""Arguments that ai-toolkit passes to optimizers by default."""
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}


def convert_job(content: Mapping[str, Any], folder: Path, target: RunContent) -> None:
    """Converts a job.

    Args:
        content: the file's content. `folder`: of the file, to which relative folders of photos refer.
    Raises:
        OptionError: no process, or one that does not train.
    """
    job = SourceTable(content, "", target)
    if job.take("job", "extension") not in ("extension", "train"):
        job.remark("left_out", "job", "only the options of training are carried over")
    config = SourceTable(job.take("config", {}), "config.", target)
    name, processes = config.take("name"), config.take("process", [])
    if not isinstance(processes, list) or not processes or not isinstance(processes[0], dict):
        message = "config.process: no process; expected a list with one that trains, of type sd_trainer."
        raise OptionError(message, option="file", where="config.process", given=processes, expected="sd_trainer")
    if len(processes) > 1:
        config.remark("left_out", "process", f"{len(processes)} processes; only the first is converted")
    process = SourceTable(processes[0], "config.process[0].", target)
    parts = {key: _section(process, key, target) for key in SECTIONS if key != "datasets"}
    process.take("type")
    options = target.options
    if name or process.take("training_folder"):
        options["out"] = str(Path(process.take("training_folder", "runs")) / str(name or "run"))
    trigger = process.take("trigger_word")
    if trigger:
        options["concept"] = str(trigger)
    else:
        reason = "no trigger_word; set concept to the trigger token in the captions"
        SourceTable({}, "config.process[0].", target).remark("missing", "trigger_word", reason)
    _set_network(parts["network"], target)
    _set_train(parts["train"], options)
    _set_model(parts["model"], options)
    _set_files(parts["save"], parts["sample"], parts["logging"], options)
    for i, dataset in enumerate(process.take("datasets", [])):
        table = SourceTable(dataset, f"config.process[0].datasets[{i}].", target)
        target.datasets.append(_dataset(table, str(trigger or ""), folder))
    for table in (job, config, process, *parts.values()):
        for key in IMPLIED:
            table.take(key)
        table.explain(OMISSIONS)
        table.report_unknown()


def _section(process: SourceTable, key: str, target: RunContent) -> SourceTable:
    content = process.take(key, {})
    return SourceTable(content if isinstance(content, dict) else {}, f"config.process[0].{key}.", target)


def _set_network(network: SourceTable, target: RunContent) -> None:
    """Method, rank and alpha; the default alpha of ai-toolkit is 1."""
    kind = network.take("type", "lora")
    method = METHODS.get(kind, "lora")
    if kind not in METHODS:
        network.remark("left_out", "type", "expected lora, locon, lokr or dora; lora is used")
    target.options["method"] = method
    network.carry({"pretrained_lora_path": "init_from"}, target.options, str)
    rank = network.take("linear", network.take("rank", 4))
    alpha = network.take("linear_alpha", network.take("alpha", 1.0))
    options = target.methods.setdefault(method, {})
    if method == "lokr" and network.take("lokr_full_rank"):
        network.remark("changed", "lokr_full_rank", "the rank is left out, so that both factors are full matrices")
    else:
        options |= {"rank": int(rank), "alpha": float(alpha)}
    if method == "lokr" and (factor := network.take("lokr_factor")):
        options["factor"] = int(factor)
    if (conv := network.take("conv")) is not None and method in ("lora", "lokr"):
        options["by_site"] = {"conv.*": {"rank": int(conv), "alpha": float(network.take("conv_alpha", conv))}}
        target.options["where"] = ["attn", "xattn", "mlp", "conv.*"]
    if (dropout := network.take("dropout")) and method == "lora":
        options["dropout"] = float(dropout)


def _set_train(train: SourceTable, options: dict[str, Any]) -> None:
    train.carry(TRAIN, options)
    train.carry(TRAIN_FLOATS, options, float)
    if (rate := train.take("unet_lr")) is not None:
        options["learning_rate"] = float(rate)
    text = train.take("text_encoder_lr")
    if text is not None and options.get("text_encoder"):
        options["text_learning_rate"] = float(text)
    if not train.take("train_unet", True):
        train.remark("left_out", "train_unet", "adapters of the denoiser are always trained")
    set_optimizer(train, options, "optimizer", "optimizer_params", EPSILON)
    set_schedule(train, options, "lr_scheduler", "lr_warmup_steps", "lr_scheduler_params")
    set_timesteps(train, options, "timestep_type")
    ema = train.take("ema_config", {})
    if ema.get("use_ema"):
        options["ema"] = float(ema.get("ema_decay", 0.99))
    dtype = DTYPES.get(str(train.take("dtype", "fp32")))
    if dtype is not None:
        options |= {"dtype": dtype, "mixed_precision": PRECISIONS[dtype]}
    loss = train.take("loss_type", "mse")
    if loss in ("mse", "l2"):
        options["loss"] = "l2"
    else:
        train.remark("left_out", "loss_type", "expected mse; l2 is used")
    if train.take("content_or_style", "balanced") != "balanced":
        train.remark("left_out", "content_or_style", "set timestep_sampling")


def _set_model(model: SourceTable, options: dict[str, Any]) -> None:
    model.carry({"name_or_path": "base"}, options)
    if model.take("is_v_pred"):
        options["prediction"] = "v_prediction"
    if model.take("quantize"):
        options["quantize"] = ["fp8"]
        model.remark("changed", "quantize", "8-bit floats of another library; quantize lists the other kinds")


def _set_files(save: SourceTable, sample: SourceTable, logging: SourceTable, options: dict[str, Any]) -> None:
    if (dtype := DTYPES.get(str(save.take("dtype")))) is not None:
        options["save_dtype"] = dtype
    if (every := save.take("save_every")) is not None:
        options["checkpoint_every"] = int(every)
        save.remark("changed", "save_every", "checkpoints to resume from, instead of adapter files")
    if (every := sample.take("sample_every")) is not None:
        options["preview_every"] = int(every)
    sample.carry({"sample_steps": "preview_steps"}, options, int)
    set_sampler(sample, options, "sampler")
    concept = options.get("concept")
    texts = [prompt if isinstance(prompt, str) else prompt.get("prompt", "") for prompt in sample.take("prompts", [])]
    if texts:
        options["prompts"] = [_with_concept(text, concept) for text in texts]
    if logging.take("use_wandb"):
        options["tracker"] = "wandb"


def _with_concept(text: str, trigger: Any) -> str:
    """The text with `{concept}` instead of the trigger word; at its start if it is not there."""
    text = text.replace("[trigger]", "{concept}")
    if trigger:
        text = text.replace(str(trigger), "{concept}")
    return text if "{concept}" in text or not trigger else f"{{concept}} {text}"


def _dataset(table: SourceTable, trigger: str, folder: Path) -> dict[str, Any]:
    path = table.take("folder_path", table.take("dataset_path"))
    if not path:
        message = f"{table.place}folder_path: missing; expected the folder of the images."
        raise OptionError(message, option="file", where=f"{table.place}folder_path", given=path, expected="a folder")
    extension = f".{str(table.take('caption_ext', 'txt')).lstrip('.')}"
    options: dict[str, Any] = {"path": str(path), "caption_extension": extension}
    table.carry(DATASET, options)
    sides = table.take("resolution", 512)
    options["resolution"] = [int(side) for side in (sides if isinstance(sides, list) else [sides])]
    if table.take("flip_x"):
        options["flip"] = 0.5
    if table.take("random_crop"):
        options["crop"] = "random"
    if caption := table.take("default_caption"):
        options["template"] = [str(caption) if options.get("regularization") else _with_concept(str(caption), trigger)]
    if trigger and not options.get("regularization") and not _all_mention(folder / path, extension, trigger):
        options["caption_prefix"] = "{concept}"
        reason = "before every caption, as ai-toolkit adds it; remove caption_prefix if the captions contain it"
        SourceTable({"trigger_word": trigger}, table.place, table.target).remark("changed", "trigger_word", reason)
    if options.get("template") and "{concept}" in options["template"][0] and "caption_prefix" in options:
        del options["caption_prefix"]
    for key in IMPLIED:
        table.take(key)
    table.explain(OMISSIONS)
    table.report_unknown()
    return options


def _all_mention(folder: Path, extension: str, trigger: str) -> bool:
    """Whether there are caption files and all contain the trigger word."""
    files = sorted(folder.glob(f"*{extension}")) if folder.is_dir() else []
    return bool(files) and all(trigger in file.read_text(encoding="utf-8", errors="replace") for file in files)
