"""Merge several adapter files into one LoRA file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veneer import adapter_merging, formats
from veneer.injection import OptionError

from .convert import To, open_base


@dataclass(frozen=True)
class MergeConfig:
    """Configuration of `veneer merge` and its defaults.

    Args:
        files: adapters of any methods that change weights: safetensors files of any format, folders or hub names. Trained token
            embeddings, as of `pivotal`, are kept: in the same file, or beside it if the format cannot contain them.
        weights: one number per file, also negative (default: 1), or `'PATTERN=NUMBER;…'` with patterns of sites, such as
            `'attn=0.5;text/attn=0'`, and 1 for the rest. Token embeddings are not scaled.
        method: `sum` (exact, ranks add up; LoRA only), `svd` (the sum, reduced to a rank), `ties` (largest entries, by sign),
            `dare` (random entries, rescaled) or `dare_ties`.
        rank: rank of the result, not for `sum`, with one of the next four the upper limit (default: the largest rank of the
            files).
        energy: smallest rank of each weight that keeps this share of the squared singular values, 0 to 1; the square of
            sd-scripts' `sv_fro`.
        error: smallest rank with at most this relative error of each ΔW, in the Frobenius norm, 0 to 1.
        cumulative: smallest rank that keeps this share of the sum of singular values, 0 to 1; sd-scripts' `sv_cumulative`.
        ratio: keep singular values above the largest one divided by this number, above 1; sd-scripts' `sv_ratio`.
        density: share of the entries of each ΔW that `ties` (default: 0.2) or `dare` (default: 0.1) keeps, 0 to 1.
        seed: seed of `dare` and `dare_ties`.
        base: base model: `bundled`, a folder, a file, a hub name, or an architecture without weights such as `sdxl` or `flux`
            (default: that of a native file, else the architecture that fits the files).
        to: format to write, as in `veneer convert` (default: that of the first file).
        dtype: dtype of the saved tensors.
        out: the new file, for `peft_folder` a folder; required.
    """

    files: tuple[Path, ...]
    weights: tuple[str, ...] = ()
    method: Literal["sum", "svd", "ties", "dare", "dare_ties"] = "sum"
    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    cumulative: float | None = None
    ratio: float | None = None
    density: float | None = None
    seed: int = 0
    base: str | None = None
    to: To | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    out: Path | None = None


def merge(config: MergeConfig) -> list[str]:
    """Loads all adapters on the base, merges them and writes the LoRA.

    Returns:
        Lines with the files, the ranks and the error relative to the exact result, the weights with the largest errors, and the
        tokens.
    Raises:
        VeneerError: base or `out` is missing, a file is incompatible with the base, two files have different embeddings of a
            token, or the adapters cannot be merged or saved in the format.
    """
    if not config.files or config.out is None:
        missing = "files" if not config.files else "out"
        message = f"merge: {missing} is missing; expected the files to merge, and --out for the new file."
        raise OptionError(message, option=missing, method="merge")
    files = [formats.local_path(file) for file in config.files]
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
            model, sources, weights, how=config.method, keep=keep, density=config.density, seed=config.seed, dtype=dtype
        )
    record = {
        **provenance,
        "merged": [file.name for file in config.files],
        "weights": list(config.weights),
        "how": config.method,
    }
    written = adapter_merging.write_all(model, result, tokens, config.out, form, dtype, record)
    return [*map(str, written), *(str(result).splitlines() if result else []), *(f"token {each.token}" for each in tokens)]


def _weight(text: str) -> float | Mapping[str, float]:
    """A number, or PATTERN=NUMBER;…"""
    try:
        if "=" not in text:
            return float(text)
        return {pattern: float(number) for pattern, _, number in (part.rpartition("=") for part in text.split(";"))}
    except ValueError as error:
        message = f"merge: weight {text!r}; expected a number, or PATTERN=NUMBER;PATTERN=NUMBER."
        raise OptionError(message, option="weights", method="merge", given=text) from error
