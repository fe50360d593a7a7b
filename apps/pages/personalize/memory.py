"""Predicted memory of a run for its quantization and offloading, without a training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from veneer import methods
from veneer.cli import parser_for
from veneer.flags import values
from veneer.training.method_names import split_methods
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.preflight.estimates import size
from veneer.training.preflight.memory_check import MemoryCheck, check_memory
from veneer.training.preflight.memory_prediction import MemoryPrediction

from ...context import Context, show_errors
from ...workspace import Workspace
from ..shared.html import note, table
from .request import PersonalizeRequest, command

CHOICES = ("quantize", "offload_encoders", "gradient_checkpointing", "dtype")
"""Settings after whose change the prediction is updated."""


def config_of(request: PersonalizeRequest, device: str) -> PersonalizeConfig:
    """Config of a request as the command reads it, to be checked against the memory of a device.

    Raises:
        VeneerError: a value that the command would reject.
    """
    words = command(replace(request, concept=request.concept or "<concept>"), Path("photos"))
    flags = vars(parser_for(words).parse_args(words))
    options = {name: values(methods.get(name), flags, name) for name in split_methods(request.method)}
    return PersonalizeConfig(**values(PersonalizeConfig, flags) | {"check": device}, options=options)


def predict_memory(request: PersonalizeRequest, device: str) -> str:
    """Verdict and parts of the predicted memory of a run, in HTML.

    Args:
        device: `cuda` or `cpu` of the server, with whose free memory the prediction is compared.
    Raises:
        VeneerError: a value that the command would reject, or a base model without configs on this machine.
    """
    check = check_memory(config_of(request, device))
    caption = f"Predicted memory at {check.prediction.resolution} pixels, batch {check.prediction.batch}"
    return note(verdict(check), "bad" if check.proposal else "good") + table(
        caption, ("part", "format", "memory"), rows(check.prediction)
    )


def verdict(check: MemoryCheck) -> str:
    """Whether the run fits, in one sentence, and otherwise the settings with which it does."""
    device, free = check.capacity.device, size(check.capacity.size)
    needs = f"needs {size(check.prediction.peak)} of the {free} that are free on this machine ({device})"
    if check.proposal is None:
        return f"The run fits: it {needs}."
    settings = ", ".join(flag.removeprefix("--").replace("-", " ") for flag in check.proposal.flags)
    least = size(check.proposal.prediction.peak)
    if check.proposal.fits:
        return f"The run does not fit: it {needs}. With {settings} it needs {least}."
    return f"The run does not fit: it {needs}, and with {settings} still {least}. Choose a smaller base model."


def rows(prediction: MemoryPrediction) -> list[tuple[str, str, str]]:
    """(part, format, memory) of each part and of the peak of each phase."""
    return [(part, form, size(count)) for part, form, count in prediction.rows()]


class MemoryFields:
    """The predicted memory of a run, below the button that asks for it."""

    def __init__(self, button: gr.Button) -> None:
        self.button = button
        self.answer = gr.HTML("", elem_id="train-memory-answer")

    def connect(
        self,
        context: Context,
        read_form: Callable[..., PersonalizeRequest],
        form: Sequence[Any],
        settings: Mapping[str, Any],
    ) -> None:
        """Connects the button, and updates the answer after a change of quantization or offloading.

        Args:
            read_form: makes a request of the workspace and the values of `form`. `settings`: components by name.
        """
        device = "cuda" if context.generator.device.startswith("cuda") else "cpu"

        def predict(request: gr.Request, *entries: Any) -> str:
            workspace: Workspace = context.workspace(request)
            return predict_memory(read_form(workspace, *entries), device)

        events = [self.button.click, *(settings[name].input for name in CHOICES)]
        single: dict[str, Any] = {"concurrency_id": "memory", "concurrency_limit": 1, "trigger_mode": "always_last"}
        gr.on(events, show_errors(predict), [*form], self.answer, api_visibility="private", **single)
