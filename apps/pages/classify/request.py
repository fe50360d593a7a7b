"""Training requests of the page Classify, validated and converted to `veneer transfer` commands."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.classification.config import TransferConfig
from veneer.classification.models.loading import check_name
from veneer.classification.models.transformers_loading import PREFIX, is_transformers_name
from veneer.hub.names import is_repository
from veneer.injection import OptionError, VeneerError
from veneer.injection import methods as registry
from veneer.training.method_names import split_methods

from ...context import Context
from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace, check_text, printable
from ..methods.availability import classifier_methods, reason_not_offered
from ..shared.verdict import replace_flags
from .labeled_data import DIGITS, KIND, MULTI_LABEL, is_multi_label, resolve_data
from .method_options import method_options

AUGMENT = {
    "flip": "crops and flips",
    "light": "crops",
    "strong": "crops, flips and color changes",
    "none": "none",
}
DEFAULTS = TransferConfig()


@dataclass(frozen=True)
class ClassifyRequest:
    """Unchecked values of the form; 0 means the default."""

    source: str = DIGITS
    file: str | None = None
    folder: str = ""
    job: str | None = None
    model: str = DEFAULTS.model
    methods: Sequence[str] = ("linear_probe",)
    epochs: float | None = DEFAULTS.epochs
    shots: float | None = 0
    size: float | None = 0
    batch: float | None = DEFAULTS.batch
    rate: float | None = 0
    augment: str = DEFAULTS.augment
    patience: float | None = 0
    seed: float | None = 0
    multi_label: bool = False
    options: str = ""


def submit_jobs(context: Context, workspace: Workspace, request: ClassifyRequest) -> tuple[list[Job], list[str]]:
    """Submits one job per method on the same images and splits; returns them, and why images of a zip were rejected.

    Raises:
        VeneerError: an invalid request or too many queued jobs; no job is submitted in that case.
    """
    flags = settings(workspace, request)
    methods = check_methods(request.methods, request.model)
    options = method_options(request.options, methods)
    if is_multi_label(workspace, request.source, request.job, request.multi_label):
        check_multi_label(request, methods)
    free = LIMITS.jobs - workspace.count_active()
    if len(methods) > free:
        raise VeneerError(
            f"{len(methods)} methods need {len(methods)} jobs, but the queue has room for {max(free, 0)}. Choose fewer, or wait "
            "for a job to end.",
            where="jobs",
            given=len(methods),
            expected=max(free, 0),
        )
    images = resolve_data(workspace, request.source, request.file, request.folder, request.job, request.multi_label)
    flags += [MULTI_LABEL] if images.multi_label else []
    jobs = []
    for method in methods:
        command = ["transfer", images.data, f"--method={method}", *flags, *options[method]]
        jobs.append(context.submit(workspace, KIND, f"{images.name} · {method}", command))
    return jobs, list(images.left_out)


def check_multi_label(request: ClassifyRequest, methods: Sequence[str]) -> None:
    """Checks that the methods can be trained on images with several labels.

    Raises:
        OptionError: a model, method or setting that needs one label per image.
    """
    for method in methods:
        config = TransferConfig(model=request.model, method=method, multi_label=True, shots=int(request.shots or 0) or None)
        try:
            config.check_multi_label()
        except OptionError as error:
            raise OptionError.from_error(error, replace_flags(str(error))) from error


def settings(workspace: Workspace, request: ClassifyRequest) -> list[str]:
    """Flags of the model and the settings.

    Raises:
        VeneerError: unknown model, or a number out of range.
    """
    flags = [f"--model={resolve_model(workspace, request.model)}"]
    whole = (
        ("epochs", request.epochs, 1, LIMITS.epochs),
        ("batch", request.batch, 1, LIMITS.batch),
        ("size", request.size, 8, LIMITS.side),
        ("shots", request.shots, 1, LIMITS.zip_files),
        ("patience", request.patience, 1, LIMITS.epochs),
        ("seed", request.seed, 0, 2**31 - 1),
    )
    for name, value, least, most in whole:
        if value is None:
            message = f"{name} is empty; expected {least:g} to {most:g}, or 0 for the default."
            raise OptionError(message, option=name, given=None, expected=(least, most))
        if value:
            flags.append(f"--{name}={int(check_number(name, value, least, most))}")
    if request.rate is None:
        raise OptionError("learning rate is empty; expected a number, or 0 for the default.", option="learning rate", given=None)
    if request.rate:
        flags.append(f"--learning-rate={check_number('learning rate', request.rate, 1e-7, 10.0):g}")
    if request.augment not in AUGMENT:
        message = f"augmentation is {printable(str(request.augment))!r}; expected one of {', '.join(AUGMENT)}."
        raise OptionError(message, option="augmentation", given=request.augment, expected=tuple(AUGMENT))
    return [*flags, f"--augment={request.augment}"]


def check_number(name: str, value: Any, least: float, most: float) -> float:
    """Checks that a value is a number in a range.

    Raises:
        VeneerError: it is not.
    """
    if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
        message = f"{name} is {printable(str(value))}; expected {least:g} to {most:g}."
        raise OptionError(message, option=name, given=value, expected=(least, most))
    return value


def resolve_model(workspace: Workspace, name: str) -> str:
    """Checks the name of a model; a folder is accepted if the app has no logins.

    Raises:
        VeneerError: unknown model.
    """
    name = check_text(name or "", "model")
    prefix, path = (PREFIX, name.removeprefix(PREFIX)) if is_transformers_name(name) else ("", name)
    folder = Path(path).expanduser()
    if workspace.user is None and folder.is_dir() and ("/" in path or "\\" in path):
        return f"{prefix}{folder.resolve()}"
    if workspace.user is not None and prefix and not is_repository(path):
        raise OptionError(f"{name}: expected hf:USER/REPO of the hub.", option="model", given=name, expected="hf:USER/REPO")
    check_name(name)
    return name


def check_methods(methods: Sequence[str], model: str) -> list[str]:
    """Checks the methods and removes duplicates; combined methods are joined by `+`.

    Raises:
        VeneerError: no method, or one that the model does not support.
    """
    known = classifier_methods(model)
    chosen = list(dict.fromkeys(re.sub(r"\s", "", str(method)) for method in methods or ()))
    if not chosen:
        message = "no method is chosen; choose one or more, such as linear_probe and lora."
        raise OptionError(message, option="methods", given=())
    for method in chosen:
        for name in [method] if method == "zero_shot" else split_methods(method):
            if name not in known:
                reason = _reason(name) or "it is not supported by this model. Choose a method from the list."
                message = f"{printable(name)}: {reason}"
                raise OptionError(message, option="methods", given=name, expected=tuple(known))
    return chosen


def _reason(name: str) -> str:
    """Why no form offers a method; empty for unknown names and methods of other models."""
    return reason_not_offered(registry.get(name)) if name in registry.names() else ""
