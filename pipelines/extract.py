"""Extract a LoRA from a fine-tuned model: the difference to its base, reduced to a rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from veneer import adapter_merging, base_models
from veneer.injection import OptionError

from .convert import To


@dataclass(frozen=True)
class ExtractConfig:
    """Configuration of `veneer extract` and its defaults.

    Args:
        tuned: the fine-tuned model: a diffusers folder, a .safetensors file or a hub name.
        base: the base model that it was fine-tuned from, as for `tuned`, or `bundled`; required.
        where: sites, by role as in `veneer sites` (default: all linear layers and convolutions).
        rank: rank of the LoRA; this or one of the next four is required, and with one of them it is the upper limit.
        energy: smallest rank of each weight that keeps this share of the squared singular values, 0 to 1; the square of
            sd-scripts' `sv_fro`.
        error: smallest rank with at most this relative error of each ΔW, in the Frobenius norm, 0 to 1.
        cumulative: smallest rank that keeps this share of the sum of singular values, 0 to 1; sd-scripts' `sv_cumulative`.
        ratio: keep singular values above the largest one divided by this number, above 1; sd-scripts' `sv_ratio`.
        to: format to write, as in `veneer convert`.
        dtype: dtype of the saved tensors.
        out: the new file, for `peft_folder` a folder; required.
    """

    tuned: str
    base: str | None = None
    where: tuple[str, ...] = ()
    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    cumulative: float | None = None
    ratio: float | None = None
    to: To = "native"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    out: Path | None = None


def extract(config: ExtractConfig) -> list[str]:
    """Loads both models, computes the differences, reduces their rank and writes the LoRA.

    Returns:
        Lines with the file, the ranks and the error, the weights with the largest errors, and differences not included.
    Raises:
        VeneerError: base, rank or `out` is missing, the models are incompatible, or the format does not support the LoRA.
    """
    keep = adapter_merging.rank_selection_of(config.rank, config.energy, config.error, config.cumulative, config.ratio)
    if config.base is None or config.out is None or keep is None:
        missing = "base" if config.base is None else "out" if config.out is None else "rank"
        message = f"extract: no --{missing}; expected --base, --out, and --rank, --energy, --error, --cumulative or --ratio."
        raise OptionError(message, option=missing, method="extract")
    adapter_merging.new_file(config.out, config.to)
    base, tuned, dtype = base_models.load(config.base), base_models.load(config.tuned), adapter_merging.DTYPES[config.dtype]
    result = adapter_merging.extract(base, tuned, keep, where=config.where or None, dtype=dtype)
    provenance = {"base": config.base, "extracted": config.tuned}
    return [str(adapter_merging.write(result, config.out, config.to, dtype, provenance)), *str(result).splitlines()]
