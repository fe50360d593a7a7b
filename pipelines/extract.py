"""A LoRA out of a fine-tuned model: its weights minus its base's, cut to a rank."""

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
        tuned: the fine-tuned pipeline: a folder or a hub name.
        base: the base model that it was fine-tuned from: `bundled`, a folder or a hub name.
        where: sites, as listed by `veneer sites` (default: all linear layers and convolutions).
        rank: rank of the LoRA.
        energy: smallest rank that keeps this share of the squared singular values, up to 1. `rank` is then the upper limit, as
            with the next three.
        error: smallest rank with at most this relative error of each delta weight, 0 to 1 (Frobenius norm).
        cumulative: smallest rank that keeps this share of the sum of singular values, up to 1.
        ratio: keep singular values above the largest one divided by this number, above 1.
        to: format to write.
        dtype: dtype of the saved tensors.
        out: the new file.
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
    """Load both, subtract, cut, write.

    Returns:
        The file, ranks and error, the weights where it is largest, and what differs and is not in the file.
    Raises:
        VeneerError: no base, rank or `out` was named, the models do not fit, or the format cannot hold it.
    """
    keep = adapter_merging.keep_of(config.rank, config.energy, config.error, config.cumulative, config.ratio)
    if config.base is None or config.out is None or keep is None:
        missing = "base" if config.base is None else "out" if config.out is None else "rank"
        message = "extract: --base, --out and --rank, --energy, --error, --cumulative or --ratio must be given."
        raise OptionError(message, option=missing, method="extract")
    adapter_merging.free(config.out, config.to)
    base, tuned, dtype = base_models.load(config.base), base_models.load(config.tuned), adapter_merging.DTYPES[config.dtype]
    made = adapter_merging.extract(base, tuned, keep, where=config.where or None, dtype=dtype)
    told = {"base": config.base, "extracted": config.tuned}
    return [str(adapter_merging.write(made, config.out, config.to, dtype, told)), *str(made).splitlines()]
