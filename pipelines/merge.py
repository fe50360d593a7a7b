"""Merge several adapter files into one: a LoRA, the mean of their parameters, or all of them in a composition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from veneer import adapter_merging, base_models, formats
from veneer.adapter_merging.combine import How
from veneer.classification.data.labeled_images import LIMITS
from veneer.classification.image_paths import find_images
from veneer.injection import OptionError
from veneer.training.data.image_io import decode

from .convert import To, open_base

FROM_FILES = ("parameters", "aligned", "stack", "average", "parallel")
"""Values of `method` that need native files and no base model."""
LORA_OPTIONS = ("rank", "energy", "error", "cumulative", "ratio", "density", "base", "to", "dtype")
"""Options of the methods that write a LoRA."""
SOUP_OPTIONS = ("heads", "images", "domains", "select", "most", "clip")
"""Options of the methods that average parameters."""
SELECTION_OPTIONS = ("select", "most", "clip")
"""Those of them that need `images` and `domains`."""
MOST_IMAGES = 100
"""Images of a folder whose features are computed."""


@dataclass(frozen=True)
class MergeConfig:
    """Configuration of `veneer merge` and its defaults.

    Args:
        files: adapters of any methods that change weights: safetensors files of any format, folders or hub names. Trained token
            embeddings, as of `pivotal`, are kept: in the same file, or beside it if the format cannot contain them.
        weights: one number per file, also negative (default: 1; equal shares with `parameters`, `aligned` and `average`; not with
            `stack` and `parallel`), or for a LoRA `'PATTERN=NUMBER;…'` with patterns of sites, such as `'attn=0.5;text/attn=0'`,
            and 1 for the rest. Token embeddings are not scaled.
        method: `sum` (exact, ranks add up; LoRA only), `svd` (the sum, reduced to a rank), `ties` (largest entries, by sign),
            `dare` (random entries, rescaled) or `dare_ties` write one LoRA; `parameters` (AdapterSoup) and `aligned` (MerA: with
            the neurons of bottlenecks matched by optimal transport) write the mean of native files of one method, with equal
            options; `stack`, `average` and `parallel` write all adapters of native files of any methods, which then act one
            after the other, by the mean of their outputs, or each on a copy of the batch.
        rank: rank of the result, not for `sum`, with one of the next four the upper limit (default: the largest rank of the
            files).
        energy: smallest rank of each weight that keeps this share of the squared singular values, 0 to 1; the square of
            sd-scripts' `sv_fro`.
        error: smallest rank with at most this relative error of each ΔW, in the Frobenius norm, 0 to 1.
        cumulative: smallest rank that keeps this share of the sum of singular values, 0 to 1; sd-scripts' `sv_cumulative`.
        ratio: keep singular values above the largest one divided by this number, above 1; sd-scripts' `sv_ratio`.
        density: share of the entries of each ΔW that `ties` (default: 0.2) or `dare` (default: 0.1) keeps, 0 to 1.
        seed: seed of `dare` and `dare_ties`, and of the clusters of `select`.
        heads: with `parameters` or `aligned`, `average` the heads of classifiers as well, or `drop` them, as for adapters of
            tasks with other classes.
        images: with `parameters` or `aligned`, folder of images of a new domain: only the files whose domains are most similar to
            it are averaged; needs `domains`, without `weights`.
        domains: with `images`: for each file, in their order, a folder of images that it was trained on. Of each folder at most
            100 images are read.
        select: with `images`: by `clusters`, the files in whose clusters at least a tenth of the new images falls, or by
            `similarity` of the mean images, the `most` similar ones; both by features of a CLIP. Their shares are equal.
        most: with `images`: largest number of files to average, at least 1.
        clip: with `images`: the CLIP of `select`, the bundled one or an open_clip folder.
        base: base model: `bundled`, a folder, a file, a hub name, or an architecture without weights such as `sdxl` or `flux`
            (default: that of a native file, else the architecture that fits the files).
        to: format to write, as in `veneer convert` (default: that of the first file).
        dtype: dtype of the saved tensors.
        out: the new file, for `peft_folder` a folder; required.
    """

    files: tuple[Path, ...]
    weights: tuple[str, ...] = ()
    method: Literal[
        "sum", "svd", "ties", "dare", "dare_ties", "parameters", "aligned", "stack", "average", "parallel"
    ] = "sum"  # fmt: skip
    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    cumulative: float | None = None
    ratio: float | None = None
    density: float | None = None
    seed: int = 0
    heads: Literal["average", "drop"] = "average"
    images: Path | None = None
    domains: tuple[Path, ...] = ()
    select: Literal["clusters", "similarity"] = "clusters"
    most: int = 5
    clip: str = "bundled_clip"
    base: str | None = None
    to: To | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    out: Path | None = None


def merge(config: MergeConfig) -> list[str]:
    """Loads all adapters on the base, merges them and writes the LoRA; or writes a mean or a composition of native files.

    Returns:
        Lines with the files, and the weights of a mean, the tree of a composition, or of a LoRA the ranks, the error relative to
        the exact result, the weights with the largest errors, and the tokens.
    Raises:
        VeneerError: base or `out` is missing, a file is incompatible with the base, two files have different embeddings of a
            token, or the adapters cannot be merged or saved in the format.
    """
    if not config.files or config.out is None:
        missing = "files" if not config.files else "out"
        message = f"merge: {missing} is missing; expected the files to merge, and --out for the new file."
        raise OptionError(message, option=missing, method="merge")
    files = [formats.local_path(file) for file in config.files]
    _reject_ignored(config)
    if config.method in FROM_FILES:
        return _merge_native(config, files, config.out)
    form = config.to or adapter_merging.common_format(files)
    adapter_merging.new_file(config.out, form)
    weights = [_weight(text) for text in config.weights] or None
    keep = adapter_merging.rank_selection_of(config.rank, config.energy, config.error, config.cumulative, config.ratio)
    (model, provenance), dtype = open_base(config.base, files, "merge"), adapter_merging.DTYPES[config.dtype]
    contents = [(file, adapter_merging.read_content(model, file)) for file in files]
    tokens = adapter_merging.unite_tokens(contents)
    sources = [content.adapter for _, content in contents if content.adapter is not None]
    if weights is not None and len(weights) == len(contents):
        weights = [w for w, (_, content) in zip(weights, contents, strict=True) if content.adapter is not None]
    result = None
    if sources:
        result = adapter_merging.combine(
            model,
            sources,
            weights,
            how=cast(How, config.method),
            keep=keep,
            density=config.density,
            seed=config.seed,
            dtype=dtype,
        )
    record = {
        **provenance,
        "merged": [file.name for file in config.files],
        "weights": list(config.weights),
        "how": config.method,
    }
    written = adapter_merging.write_all(model, result, tokens, config.out, form, dtype, record)
    return [*map(str, written), *(str(result).splitlines() if result else []), *(f"token {each.token}" for each in tokens)]


def _reject_ignored(config: MergeConfig) -> None:
    """Raises `OptionError` for an option that the method does not have."""
    without = () if config.images is not None or config.domains else SELECTION_OPTIONS
    ignored = without if config.method in ("parameters", "aligned") else SOUP_OPTIONS
    for option in (*(LORA_OPTIONS if config.method in FROM_FILES else ()), *ignored):
        given, default = getattr(config, option), MergeConfig.__dataclass_fields__[option].default
        if given != default and (option, given) != ("to", "native"):
            what = " without --images" if option in without else ""
            message = f"merge: {option} has no effect with --method {config.method}{what}; leave it out."
            raise OptionError(message, option=option, method="merge", given=given, expected=default)


def _merge_native(config: MergeConfig, files: Sequence[Path], out: Path) -> list[str]:
    """A mean or a composition of native files, which needs no base model."""
    weights = [_number(text) for text in config.weights] or None
    if config.method in adapter_merging.NODES:
        path, tree = adapter_merging.compose_files(files, out, config.method, weights)
        return [str(path), str(tree)]
    weights = weights if config.images is None and not config.domains else _select(config, weights)
    path = adapter_merging.average_files(files, out, weights, aligned=config.method == "aligned", heads=config.heads == "average")
    weights = weights or [1.0] * len(files)
    parts = zip(config.files, weights, strict=True)
    return [str(path), *(f"{file.name}: {weight / sum(weights):.3g}" for file, weight in parts)]


def _number(text: str) -> float:
    weight = _weight(text)
    if isinstance(weight, Mapping):
        message = f"merge: weight {text!r}; a mean and a composition have one number for each file."
        raise OptionError(message, option="weights", method="merge", given=text, expected="a number")
    return weight


def _select(config: MergeConfig, weights: Sequence[float] | None) -> list[float]:
    """Weights of the files whose domains are most similar to the images."""
    if config.images is None or len(config.domains) != len(config.files) or weights is not None:
        option = "images" if config.images is None else "weights" if weights is not None else "domains"
        given = getattr(config, option)
        message = (
            f"merge: {option} is {given!r}; a selection needs --images, --domains with one folder for each of the "
            f"{len(config.files)} files, and no --weights."
        )
        raise OptionError(message, option=option, method="merge", given=given, expected=len(config.files))
    clip = base_models.load_clip(config.clip)
    features = [clip_features(clip, folder) for folder in (*config.domains, config.images)]
    selection = adapter_merging.select_adapters(
        features[:-1], features[-1], config.select, most=config.most, seed=config.seed
    )  # fmt: skip
    return list(selection)


def select_evenly(paths: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of the paths, at equal distances from the first to the last part."""
    count = min(len(paths), most)
    return [paths[i * len(paths) // count] for i in range(count)]


@torch.no_grad()
def clip_features(clip: base_models.BaseClip, folder: Path) -> Tensor:
    """Features (n, width) of at most 100 evenly spaced images of a folder."""
    paths = select_evenly(find_images([folder]), MOST_IMAGES)
    images = [decode(path.read_bytes(), path.name, LIMITS, remarks=False).rgb for path in paths]
    return torch.cat([clip.encode_image(clip.preprocess(image)[None]) for image in images])


def _weight(text: str) -> float | Mapping[str, float]:
    """A number, or PATTERN=NUMBER;…"""
    try:
        if "=" not in text:
            return float(text)
        return {pattern: float(number) for pattern, _, number in (part.rpartition("=") for part in text.split(";"))}
    except ValueError as error:
        message = f"merge: weight {text!r}; expected a number, or PATTERN=NUMBER;PATTERN=NUMBER."
        raise OptionError(message, option="weights", method="merge", given=text) from error
