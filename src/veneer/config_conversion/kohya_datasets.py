"""Dataset configs of sd-scripts: general, datasets and subsets as dataset tables.

A value of a subset wins over one of its dataset, and that over one of `general`. Defaults of sd-scripts are written where they
differ: captions are in `.caption` files, and photos are cropped to squares.
Source: kohya-ss/sd-scripts, docs/config_README-en.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from veneer.injection.errors import OptionError

from .source_table import RunContent, SourceTable

SUBSET = {
    "num_repeats": "repeats",
    "is_reg": "regularization",
    "keep_tokens": "keep_tokens",
    "shuffle_caption": "shuffle_tags",
    "caption_prefix": "caption_prefix",
    "caption_suffix": "caption_suffix",
    "caption_dropout_rate": "caption_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "keep_tokens_separator": "keep_tokens_separator",
    "secondary_separator": "secondary_separator",
    "alpha_mask": "masks",
}
"""Key of a subset to the option of a dataset table."""
BUCKETS = {"min_bucket_reso": "min_side", "max_bucket_reso": "max_side"}
SHARED = (
    *SUBSET, *BUCKETS, "batch_size", "resolution", "enable_bucket", "bucket_no_upscale", "caption_extension", "flip_aug",
    "random_crop", "enable_wildcard", "caption_separator", "validation_split",
)  # fmt: skip
"""Keys that are carried over and may also be in a dataset or in `general`."""
OMISSIONS = {
    "color_aug": "colors are not augmented",
    "face_crop_aug_range": "crops do not follow faces; crop the photos",
    "token_warmup_min": "the number of tags does not grow during the run",
    "token_warmup_step": "the number of tags does not grow during the run",
    "caption_dropout_every_n_epochs": "captions are dropped with a probability per sample; set caption_dropout",
    "resize_interpolation": "photos are resized by Lanczos resampling",
    "cache_info": "image sizes are read at each start",
    "bucket_reso_steps": "sides of buckets are multiples of what the base model needs",
    "skip_image_resolution": "small photos are not skipped; move them out of the folder",
    "network_multiplier": "the adapter trains at strength 1",
    "validation_seed": "the held-out photos are chosen by the seed of the run",
    "custom_attributes": "there are no attributes of datasets",
    "metadata_file": "this JSON format is not read; write captions to metadata.jsonl beside the images, with file_name and text",
    "conditioning_data_dir": "control images train control adapters: veneer control train",
}


def convert_datasets(content: Mapping[str, Any], target: RunContent, defaults: Mapping[str, Any] | None = None) -> None:
    """Converts the tables of a dataset config.

    Args:
        content: the file's content. `target`: receives options, tables and remarks.
        defaults: options of the command line with the same names, which `general` overrides.
    Raises:
        OptionError: `datasets` or `subsets` is not a list of tables, or a subset has no `image_dir`.
    """
    general = SourceTable(content.get("general", {}), "general.", target)
    for key in content.keys() - {"general", "datasets"}:
        SourceTable(content, "", target).remark("unknown", key, "not a table of a dataset config")
    batches: dict[int, None] = {}
    for i, dataset in enumerate(_tables(content.get("datasets", []), "datasets")):
        outer = SourceTable({k: v for k, v in dataset.items() if k != "subsets"}, f"datasets[{i}].", target)
        for j, subset in enumerate(_tables(dataset.get("subsets", []), f"datasets[{i}].subsets")):
            inner = SourceTable(subset, f"datasets[{i}].subsets[{j}].", target)
            inherited = {**(defaults or {}), **general.content, **outer.content, **inner.content}
            target.datasets.append(_dataset(inner, SourceTable(inherited, inner.place, target)))
            batches[int(inherited.get("batch_size") or 1)] = None
            _explain(inner)
        _explain(outer)
    _explain(general)
    _set_run_options(target, list(batches), {**(defaults or {}), **general.content}, content)


def _tables(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        message = f"{where}: got {type(value).__name__}; expected a list of tables."
        raise OptionError(message, option="file", where=where, given=type(value).__name__, expected="list")
    return value


def _explain(table: SourceTable) -> None:
    for key in (*SHARED, "image_dir", "class_tokens"):
        table.take(key)
    table.explain(OMISSIONS)
    table.report_unknown()


def _dataset(own: SourceTable, inherited: SourceTable) -> dict[str, Any]:
    """The table of one subset.

    Args:
        own: keys of the subset. `inherited`: with those of its dataset and of `general`.
    """
    path = own.take("image_dir")
    if not path:
        message = f"{own.place}image_dir: missing; expected the folder of the images."
        raise OptionError(message, option="file", where=f"{own.place}image_dir", given=path, expected="a folder")
    table: dict[str, Any] = {"path": str(path), **subject_of(own)}
    inherited.carry(SUBSET, table)
    table["caption_extension"] = str(inherited.take("caption_extension", ".caption"))
    if not table["caption_extension"].startswith("."):
        table["caption_extension"] = f".{table['caption_extension']}"
    if inherited.take("flip_aug"):
        table["flip"] = 0.5
    if inherited.take("random_crop"):
        table["crop"] = "random"
    if inherited.take("caption_separator", ",") != ",":
        own.remark("left_out", "caption_separator", "tags are separated by commas")
    table["buckets"] = bool(inherited.take("enable_bucket", False))
    if table["buckets"]:
        inherited.carry(BUCKETS, table)
        table["upscale"] = not inherited.take("bucket_no_upscale", False)
    if (resolution := inherited.take("resolution")) is not None:
        table["resolution"] = [side_of(inherited, "resolution", resolution)]
    return {key: value for key, value in table.items() if value not in (None, "")}


def subject_of(table: SourceTable) -> dict[str, Any]:
    """Concept, class word and template from `class_tokens`: its first word is the trigger token, the rest the class.

    Photos of a class, with `is_reg`, have a class word only.
    """
    words = str(table.take("class_tokens", "")).split()
    if not words:
        return {}
    if table.take("is_reg"):
        return {"class_word": " ".join(words), "template": ["{concept}"]}
    rest = " ".join(words[1:])
    return {"concept": words[0], **({"class_word": rest} if rest else {}), "template": [f"{{concept}} {rest}".strip()]}


def side_of(table: SourceTable, key: str, value: Any) -> int:
    """The side of a resolution, `512`, `[512, 512]` or `"512,512"`: of a rectangle the root of its area, in steps of 64."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    sides = [int(side) for side in parts]
    width, height = sides[0], sides[-1]
    if width == height:
        return width
    side = max(64, round(math.sqrt(width * height) / 64) * 64)
    table.remark("changed", key, f"a side of {side} pixels, whose square has about this area; buckets keep the aspect ratios")
    return side


def _set_run_options(
    target: RunContent, batches: list[int], general: Mapping[str, Any], content: Mapping[str, Any]
) -> None:  # fmt: skip
    """Options of the whole run: batch size and validation share."""
    shares = [float(each.get("validation_split") or general.get("validation_split") or 0) for each in content.get("datasets", [])]
    differing = {"batch_size": batches, "validation_split": list(dict.fromkeys(shares))}
    source = SourceTable(differing, "datasets.", target)
    if batches:
        target.options["batch"] = max(batches)
    if len(batches) > 1:
        source.remark("changed", "batch_size", "a run has one batch size, the largest")
    if any(shares):
        target.options["validation_share"] = max(shares)
    if len(set(shares)) > 1:
        source.remark("changed", "validation_split", "a run has one share for all datasets, the largest")
    if any(table.get("concept") for table in target.datasets):
        for table in target.datasets:
            table.setdefault("concept", "")  # not that of another dataset
    else:
        reason = "no class_tokens; set concept to the trigger token in the captions, at the top of the file"
        SourceTable({}, "", target).remark("missing", "concept", reason)
