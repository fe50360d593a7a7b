"""Options that commands share: sites, the optimizer, learning rates by block, and adapters to continue from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from veneer.base_models.schedulers import Scheduler
from veneer.injection.errors import OptionError
from veneer.injection.module_patterns import module_patterns

from .loop.optimizer_options import OptimizerOptions
from .loop.optimizers import warn_ignored_rates
from .report.previews import PreviewSettings

BY_CONTENT = ("optimizer_args", "block_lr", "init_from", "with_")
"""Options that a resumed run compares by content: parameter groups, and digests of files."""
NOT_COMPARED = (*BY_CONTENT, "preview_steps", "preview_scheduler")
"""Options that may change when a run on a diffusion pipeline is resumed, or that are compared by content."""
SCHEDULE_OPTIONS: dict[str, tuple[float, tuple[str, ...]]] = {
    "cycles": (1, ("cosine_with_restarts",)),
    "power": (1.0, ("polynomial",)),
    "min_lr_ratio": (0.0, ("cosine", "cosine_with_restarts", "linear", "polynomial", "rex")),
}
"""Option of a schedule to its default and the schedules that have it."""
RATES = (
    "learning_rate", "head_learning_rate", "text_learning_rate", "token_learning_rate", "block_lr", "layer_decay",
)  # fmt: skip
"""Options of learning rates."""


@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """Sites of adapters on weights.

    Args:
        where: sites to adapt, by role as in `veneer sites`: `attn`, `attn.{q,v}`, or `mlp@6:12` for blocks 6 to 11 (default:
            the preset's, else the method's).
        target_modules: the same by module names or regular expressions, or `all-linear`, as in peft; instead of `where`.
    """

    where: tuple[str, ...] | None = None
    target_modules: tuple[str, ...] = ()

    def selection(self) -> tuple[str, ...] | None:
        """Patterns of the selected sites, or None for the default.

        Raises:
            OptionError: both options are set.
        """
        if self.where and self.target_modules:
            message = "where and target_modules both select sites; leave out one of them."
            raise OptionError(message, option="target_modules", given=self.target_modules, expected=())
        return module_patterns(self.target_modules) or self.where


@dataclass(frozen=True, kw_only=True)
class MethodSiteOptions(SiteOptions):
    """Sites of adapters on weights, also of single methods.

    Args:
        method_where: sites of single methods of the run, by the patterns of `where`, several separated by spaces, such as
            `lora=attn@0:6 'vpt=tokens.block@0 tokens.block@3'`; methods without an entry have the sites of `where`.
    """

    method_where: Mapping[str, str] = field(default_factory=dict)

    def selection_of(self, method: str) -> tuple[str, ...] | None:
        """Patterns of the selected sites of a method, or None for the default."""
        return (self.method_where[method],) if method in self.method_where else self.selection()

    def check_method_where(self, methods: Sequence[str]) -> None:
        """Raises `OptionError` if sites are selected for a method that is not trained. `methods`: those of the run."""
        if stray := tuple(name for name in self.method_where if name not in methods):
            message = f"method_where selects sites of {', '.join(stray)}, but the run trains {', '.join(methods) or 'nothing'}."
            raise OptionError(message, option="method_where", given=stray, expected=tuple(methods))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(OptimizerOptions):
    """Options of the optimizer and of the initial weights.

    Args:
        block_lr: factors of the learning rate by block: of a tower, a stage of it, or sites by role, such as `unet.down=0.5`,
            `text=0.1` or `attn@0:6=0.1` for blocks 0 to 5; of several that match a site, the last applies.
        init_from: adapter file to start from, of any format, with the methods and sites of the run; a LoRA of another rank is
            resized.
    """

    block_lr: Mapping[str, float] = field(default_factory=dict)
    init_from: Path | None = None

    def check_training_options(self) -> None:
        """Warns about learning rates that the optimizer ignores.

        Raises:
            OptionError: an option of a schedule that the chosen one does not have.
        """
        for name, (default, schedules) in SCHEDULE_OPTIONS.items():
            schedule, value = getattr(self, "schedule", None), getattr(self, name)
            if schedule is not None and value != default and schedule not in schedules:
                message = f"{name} has no effect with the schedule {schedule!r}; expected one of {', '.join(schedules)}."
                raise OptionError(message, option=name, given=value, expected=schedules)
        warn_ignored_rates(self.optimizer, {name: getattr(self, name, None) for name in RATES})


@dataclass(frozen=True, kw_only=True)
class DiffusionTrainingOptions(TrainingOptions):
    """Options of training on a diffusion pipeline: further adapters, and sampling of preview images.

    Args:
        with_: adapter files, FILE or FILE:STRENGTH, that the run trains on top of; they stay fixed, and are needed again to
            generate.
        preview_steps: denoising steps of previews, metrics and the image grid (default: the base model's).
        preview_scheduler: scheduler (sampler) of previews, metrics and the image grid (default: the base model's).
    """

    with_: tuple[str, ...] = ()
    preview_steps: int | None = None
    preview_scheduler: Scheduler | None = None

    def check_training_options(self) -> None:
        """Also checks the options of preview images that need no base model.

        Raises:
            OptionError: `preview_steps` is below 1.
        """
        super().check_training_options()
        if self.preview_steps is not None and self.preview_steps < 1:
            message = f"preview_steps is {self.preview_steps}; expected at least 1."
            raise OptionError(message, option="preview_steps", given=self.preview_steps, expected=1)


def sampling_options(settings: PreviewSettings, options: DiffusionTrainingOptions) -> PreviewSettings:
    """Sampling settings with the options of a run."""
    return replace(settings, steps=options.preview_steps or settings.steps, scheduler=options.preview_scheduler)
