"""What `veneer control train` can be told, and what is usual where it is told nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer import base_models
from veneer.injection import methods
from veneer.injection.errors import OptionError
from veneer.injection.method import Method
from veneer.training.loop.config import TrainConfig
from veneer.training.objective.objectives import ObjectiveOptions
from veneer.training.report.feature_models import check_features
from veneer.training.report.run_folder import new_folder

from .maps import maps

WITHOUT_EFFECT = (
    "data", "base", "steps", "learning_rate", "cache", "cache_folder", "resume", "eval_seeds", "features", "check", "out",
    "drawn", "shown",
)  # fmt: skip
"""Options that a resumed run may change, or that are compared by content."""


@dataclass(frozen=True)
class ControlConfig:
    """What is learnt to follow, by which method on which base.

    Args:
        data: a folder of photos with captions, and with maps for `pairs`; none for pictures that the base draws itself.
        condition: what is followed: see `veneer.control.maps.maps`; `pairs` for maps that lie beside the photos, `image` for the
            pictures themselves (IP-Adapter).
        method: `controlnet`, `t2i_adapter`, `controlnext` or `ip_adapter`.
        base: `bundled`, a folder, or a hub name, of SD 1.x, SD 2 or SDXL.
        options: method name to its options.
        train: base weights to train as well, as a selection; None for what is usual (ControlNeXt: attentions' outputs).
        drawn: pictures that the base draws where no data is given.
        held: share of the pictures that measures whether the map is followed; they are not trained on.
        template: caption of a photo without one of its own.
        caption_dropout: probability of the empty caption, so that the map alone counts; None for what is usual.
        image_dropout: probability of no picture, for `image`; guidance needs it.
        resolution: side of the pictures in pixels; None for the base's own.
        crop: `center` or `random`.
        flip: probability of mirroring, 0 to 1.
        buckets: train at the photos' aspect ratios; if not, square crops.
        steps: optimiser steps; None for what is usual on this base.
        batch: pictures in a micro-batch, over all processes; None for what is usual on this base.
        accumulation: micro-batches in a step.
        learning_rate: peak rate; None for what is usual.
        schedule: `constant`, `cosine` or `linear`; None for what is usual.
        warmup: steps of linear warm-up.
        optimizer: `adamw`, `adamw8bit`, `prodigy`, `sgd` or `adafactor`.
        weight_decay: decoupled weight decay.
        clip: largest norm of the gradient; 0 for no clipping.
        ema: decay of averaged weights, which are then what is saved; 0 for none.
        density: timestep sampling, a density of the noise level (diffusers' scripts count from the noisy end, so that their
            `--logit_mean` has the other sign); None for the default (T2I-Adapter: `cubic`).
        precision: `no` (float32), `bf16` or `fp16` autocast.
        checkpointing: recompute activations in the backward pass, for less memory.
        cache: keep latents and text embeddings instead of computing them each step.
        cache_folder: where to keep them between runs; in memory if not given.
        seed: of every random draw.
        checkpoint_every: steps between checkpoints; 0 for none but that of a stopped run.
        resume: go on from the newest checkpoint in `out`.
        preview_every: steps between previews and measurements of a few held pictures, which `curve.json` collects; 0 for none,
            None for four in the run.
        strength: of the control in what is measured and shown.
        eval_seeds: drawings of each held picture that are measured; 0 for no figures.
        shown: held pictures on the sheet.
        features: image model that measures `image`: `bundled`, a folder, or such as `timm:vit_small_patch16_224.dino`.
        tracker: names that accelerate knows, separated by commas, or `none`.
        check: only say what would be trained, and stop.
        out: folder for all results; None for a new one under `runs`.
    """

    data: Path | None = None
    condition: str | None = None
    method: str = "controlnet"
    base: str = "bundled"
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    train: tuple[str, ...] | None = None
    drawn: int = 384
    held: float = 0.1
    template: str = ""
    caption_dropout: float | None = None
    image_dropout: float = 0.1
    resolution: int | None = None
    crop: str = "center"
    flip: float = 0.0
    buckets: bool = True
    steps: int | None = None
    batch: int | None = None
    accumulation: int = 1
    learning_rate: float | None = None
    schedule: str | None = None
    warmup: int = 0
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    density: str | None = None
    precision: str = "no"
    checkpointing: bool = False
    cache: bool = True
    cache_folder: Path | None = None
    seed: int = 0
    checkpoint_every: int = 0
    resume: bool = False
    preview_every: int | None = None
    strength: float = 1.0
    eval_seeds: int = 2
    shown: int = 6
    features: str = "bundled"
    tracker: str = "tensorboard"
    check: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("held", "image_dropout"):
            if not 0 <= getattr(self, name) < 1:
                given = getattr(self, name)
                raise OptionError(f"{name} is {given!r}; expected a share in [0, 1).", option=name, given=given)
        if not methods.get(self.method).conditions:
            fitting = tuple(n for n in methods.names() if methods.get(n).conditions)
            message = f"method {self.method!r} is given nothing to follow; expected one of {', '.join(fitting)}."
            raise OptionError(message, option="method", given=self.method, expected=fitting)
        stray = sorted(set(self.options) - {self.method})
        if stray:
            message = f"options for {', '.join(stray)}, but the run trains {self.method}."
            raise OptionError(message, option="options", given=tuple(stray), expected=(self.method,))
        if self.condition is not None and (maps.get(self.condition).name == "image") != self.reads_pictures:
            message = f"{self.method} follows {'pictures' if self.reads_pictures else 'maps'}, not {self.condition!r}."
            raise OptionError(message, option="condition", method=self.method, given=self.condition)

    @property
    def reads_pictures(self) -> bool:
        """True for a method that follows pictures by their features, not maps of them."""
        return "embeds" in methods.get(self.method).conditions

    def completed(self) -> ControlConfig:
        """The same with every open choice made: what is usual on the base, and a new folder."""
        check_features(self.features)
        known = base_models.preset(self.base).training.get(self.method, {})
        condition = self.condition or ("image" if self.reads_pictures else "canny")
        usual: dict[str, Any] = {
            "condition": condition,
            "steps": self.usual_steps() if self.steps is None else self.steps,
            "batch": int(known.get("batch", 4)) if self.batch is None else self.batch,
            "schedule": self.schedule or str(known.get("schedule", "constant")),
            "learning_rate": self._rate(known),
            "options": {self.method: {**known.get("options", {}), **self.options.get(self.method, {})}},
            "out": self.out or new_folder(Path("runs"), f"{condition}-{self.method}"),
        }
        if self.preview_every is None:
            usual["preview_every"] = max(1, usual["steps"] // 4)
        if self.train is None:
            usual["train"] = ("attn.out", "xattn.out") if self.method == "controlnext" else ()
        if self.caption_dropout is None:
            usual["caption_dropout"] = float(known.get("caption_dropout", 0.1 if self.reads_pictures else 0.5))
        if self.density is None and self.method == "t2i_adapter":
            usual["density"] = "cubic"
        found = dataclasses.replace(self, **usual)
        found.loop(), found.objective(), found.built()
        return found

    def _rate(self, known: Mapping[str, Any]) -> float:
        usual = float(known.get("learning_rate", methods.get(self.method).learning_rate))
        return usual if self.learning_rate is None else self.learning_rate

    def usual_steps(self) -> int:
        """The default number of optimizer steps on the base."""
        return int(base_models.preset(self.base).training.get(self.method, {}).get("steps", 20_000))

    def built(self) -> Method:
        """The method's config."""
        return methods.get(self.method).from_config(self.options.get(self.method, {}))

    def loop(self) -> TrainConfig:
        """The loop's part."""
        names = {f.name for f in dataclasses.fields(TrainConfig)} & {f.name for f in dataclasses.fields(self)}
        return TrainConfig(**{name: getattr(self, name) for name in names})

    def objective(self) -> ObjectiveOptions:
        """The objective's part."""
        return ObjectiveOptions(density=self.density)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share beyond the loop's settings and the pictures' bytes."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in WITHOUT_EFFECT and not hasattr(TrainConfig, k)}
        return dict(json.loads(json.dumps(fields, default=str, sort_keys=True)))
