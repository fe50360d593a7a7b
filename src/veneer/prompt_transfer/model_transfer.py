"""The prompt of one model as a prompt of another: as it is, or through a projector that is read or trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment, LoadError, OptionError

from .projector import PromptProjector
from .projector_training import minimize_distance, set_prompt, tune_on_task
from .stored_prompts import SoftPrompt, read_soft_prompt


@dataclass(frozen=True)
class ProjectorOptions:
    """How a projector is made.

    Args:
        distance: prompts of further tasks on both models, SOURCE=TARGET; empty to train by the loss of the task.
        file: of a projector that is used as it is, or None. `hidden`, `by_token`: as in `PromptProjector`.
        steps, learning_rate: of the training.
    """

    distance: Sequence[str] = ()
    file: Path | None = None
    hidden: int = 768
    by_token: bool = False
    steps: int = 300
    learning_rate: float = 1e-3


def prompt_of(attached: Attachment) -> nn.Parameter:
    """The prompt of an attachment with one."""
    ((_, adapter),) = attached.parts.values()
    (prompt,) = adapter.parameters()
    return prompt


def transfer_to_model(
    source: SoftPrompt,
    prompt: nn.Parameter,
    base: Mapping[str, Any],
    options: ProjectorOptions,
    loss: Callable[[int], Tensor],
) -> tuple[PromptProjector | None, str]:
    """Sets the prompt of a model to the transferred one.

    A prompt of the same model is used as it is, unless the options have a file or distances.

    Args:
        prompt: of the model. `base`: identity of the model. `loss`: of a step of the task, with gradients.
    Returns:
        The projector, or None without one, and a line on it.
    Raises:
        LoadError, StoredPromptError: a file is no projector or prompt, or of other models. OptionError: prompts of other models.
    """
    if source.base == base and not options.distance and options.file is None:
        set_prompt(prompt, source.vectors)
        return None, "the prompt is of this model, and is used as it is"
    projector = _projector(source, prompt, base, options).to(prompt.device)
    vectors = source.vectors.to(prompt.device)
    size = f"projector: {sum(p.numel() for p in projector.parameters()):,} parameters"
    if options.file is not None:
        line = f"{size}, of {options.file}"
    elif options.distance:
        pairs = [_pair(text, source, prompt) for text in options.distance]
        losses = minimize_distance(projector, pairs, options.steps, options.learning_rate)
        line = f"{size}, trained on prompts of {len(pairs)} tasks, squared distance {losses[0]:.4g} to {losses[-1]:.4g}"
    else:
        losses = tune_on_task(projector, vectors, prompt, loss, options.steps, options.learning_rate)
        line = f"{size}, trained on the task, loss {losses[0]:.4g} to {losses[-1]:.4g}"
    with torch.no_grad():
        set_prompt(prompt, projector(vectors))
    return projector, line


def models_of(source: SoftPrompt, base: Mapping[str, Any]) -> dict[str, Any]:
    """Identities of the two models, as in the file of a projector."""
    return {"source": dict(source.base), "target": dict(base)}


def _projector(source: SoftPrompt, prompt: nn.Parameter, base: Mapping[str, Any], options: ProjectorOptions) -> PromptProjector:
    """A new projector, or that of a file, if it is for these models."""
    tokens, width = source.vectors.shape
    if options.file is None:
        return PromptProjector(tokens, width, prompt.shape[1], options.hidden, options.by_token)
    projector, stored = PromptProjector.load(options.file)
    for name, expected in models_of(source, base).items():
        if stored.get(name) != expected:
            message = f"{options.file}: its {name} model is another one. Leave out --projector to train one between these models."
            raise LoadError(message, file=options.file, where=name, given=stored.get(name), expected=expected)
    return projector


def _pair(text: str, source: SoftPrompt, prompt: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Prompts of a task on both models."""
    names = text.partition("=")[::2]
    first, second = (read_soft_prompt(name) for name in names)
    if first.base != source.base:
        message = f"{names[0]}: its prompt is of another model than {source.file}; expected a prompt of the same model."
        raise OptionError(message, option="distance", file=names[0], given=first.base, expected=source.base)
    if second.vectors.shape != prompt.shape:
        given, expected = tuple(second.vectors.shape), tuple(prompt.shape)
        message = (
            f"{names[1]}: its prompt has shape {given}; expected {expected}, of the model of --to and the tokens of the prompt."
        )
        raise OptionError(message, option="distance", file=names[1], given=given, expected=expected)
    return first.vectors.to(prompt.device), second.vectors.to(prompt.device)
