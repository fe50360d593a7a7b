"""Preprocessing of transformers' image processors as timm's data config."""

from __future__ import annotations

from typing import Any

from .classifier import ModelError

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's resampling filters to their names in timm."""


def data_config(processor: Any, name: str) -> dict[str, Any]:
    """timm's data config, with which `EvalView` computes what an image processor does.

    Args:
        processor: an image processor of transformers that resizes to a fixed size, or to a short side and crops the center.
        name: of the model, for errors.
    Raises:
        ModelError: its images have no fixed size, or it resizes the two sides by different shares of the crop.
    """
    options = processor.to_dict()
    resized, cropped, mode = _sizes(options, name)
    factor = 255 * options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else 255.0
    normalizes = options.get("do_normalize", True)
    mean, std = (options[key] if normalizes else [value] * 3 for key, value in (("image_mean", 0.0), ("image_std", 1.0)))
    return {
        "input_size": (3, *cropped),
        "mean": tuple(value / factor for value in mean),
        "std": tuple(value / factor for value in std),
        "interpolation": RESAMPLING[int(options["resample"])],
        "crop_pct": _share(cropped[0], resized),
        "crop_mode": mode,
    }


def _sizes(options: dict[str, Any], name: str) -> tuple[int, tuple[int, int], str]:
    """Height to which the image or its short side is resized, (height, width) of the crop, and timm's crop mode."""
    size = {key: value for key, value in dict(options.get("size") or {}).items() if value is not None}
    crop = options.get("crop_size") if options.get("do_center_crop") else None
    cropped = (crop["height"], crop["width"]) if crop else None
    if options.get("do_resize", True) and set(size) == {"height", "width"}:
        cropped = cropped or (size["height"], size["width"])
        if size["height"] * cropped[1] == size["width"] * cropped[0]:
            return size["height"], cropped, "squash"
    elif options.get("do_resize", True) and set(size) == {"shortest_edge"} and cropped and cropped[0] == cropped[1]:
        return size["shortest_edge"], cropped, "center"
    given = {"size": size, "crop_size": cropped, "do_resize": options.get("do_resize", True)}
    message = (
        f"{name}: its image processor has {given}; expected images of one size: a height and a width, or a shortest_edge with a "
        "square crop of the center. Choose a model of a fixed resolution."
    )
    raise ModelError(message, where="preprocessor_config.json", given=given, expected=("height", "width"))


def _share(crop: int, resized: int) -> float:
    """timm's `crop_pct`, from which it computes the size again and rounds it down."""
    share = crop / resized
    return share if int(crop / share) == resized else crop / (resized + 1e-3)
