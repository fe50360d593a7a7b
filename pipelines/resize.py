"""Reduce the rank of an adapter file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veneer import adapter_merging, formats
from veneer.injection import OptionError, VeneerError

from .convert import To, open_base


@dataclass(frozen=True)
class ResizeConfig:
    """Configuration of `veneer resize` and its defaults.

    Args:
        file: an adapter of any method that changes weights: a safetensors file of any format, a folder or a hub name. Trained
            token embeddings in it are kept.
        rank: rank of the result; this or one of the next four is required, and with one of them it is the upper limit.
        energy: smallest rank of each weight that keeps this share of the squared singular values, 0 to 1; the square of
            sd-scripts' `sv_fro`.
        error: smallest rank with at most this relative error of each ΔW, in the Frobenius norm, 0 to 1.
        cumulative: smallest rank that keeps this share of the sum of singular values, 0 to 1; sd-scripts' `sv_cumulative`.
        ratio: keep singular values above the largest one divided by this number, above 1; sd-scripts' `sv_ratio`.
        base: base model: `bundled`, a folder, a file, a hub name, or an architecture without weights such as `sdxl` or `flux`
            (default: that of a native file, else the architecture that fits the file).
        to: format to write, as in `veneer convert` (default: that of the file).
        dtype: dtype of the saved tensors.
        out: the new file, for `peft_folder` a folder; required.
    """

    file: Path
    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    cumulative: float | None = None
    ratio: float | None = None
    base: str | None = None
    to: To | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    out: Path | None = None


def resize(config: ResizeConfig) -> list[str]:
    """Loads the adapter on the base, reduces each weight update to its largest singular values, and writes the LoRA.

    Returns:
        Lines with the files, the ranks and the error, the weights with the largest errors, and the tokens.
    Raises:
        VeneerError: base, rank or `out` is missing, the file is incompatible with the base, or the format does not support it.
    """
    keep = adapter_merging.rank_selection_of(config.rank, config.energy, config.error, config.cumulative, config.ratio)
    if config.out is None or keep is None:
        missing = "out" if config.out is None else "rank"
        message = f"resize: --{missing} is missing; expected --out, and one of --rank, --energy, --error, --cumulative, --ratio."
        raise OptionError(message, option=missing, method="resize")
    file = formats.local_path(config.file)
    form = config.to or adapter_merging.common_format([file])
    adapter_merging.new_file(config.out, form)
    (model, provenance), dtype = open_base(config.base, [file], "resize"), adapter_merging.DTYPES[config.dtype]
    content = adapter_merging.read_content(model, file)
    if content.adapter is None:
        message = f"{config.file}: contains only token embeddings, which have no rank; expected a LoRA."
        raise VeneerError(message, file=config.file, where="rank", given="embeddings", expected="lora")
    result = adapter_merging.resize(model, content.adapter, keep, dtype=dtype)
    record = {**provenance, "resized": config.file.name}
    written = adapter_merging.write_all(model, result, content.tokens, config.out, form, dtype, record)
    return [*map(str, written), *str(result).splitlines(), *(f"token {each.token}" for each in content.tokens)]
