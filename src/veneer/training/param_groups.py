"""Parameters of attachments in training: names, groups with learning rates, penalties and checks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from veneer.injection import Attachment
from veneer.injection.attachment.gradient_flow import check_gradient_flow
from veneer.injection.method import Method

from .attach_methods import trains_token_embeddings
from .loop.config import TrainConfig
from .loop.distributed import broadcast_start
from .loop.optimizer_step import LossStep
from .loop.optimizers import ParameterGroup
from .loop.seeds import mix


def named_parameters(attached: Sequence[Attachment]) -> dict[str, Tensor]:
    """Trainable parameters by name, `attachment/site:parameter`."""
    return {f"{a.name}/{key}": p for a in attached for key, p in a.named_parameters()}


def named_state(attached: Sequence[Attachment]) -> dict[str, Tensor]:
    """All tensors of a checkpoint: `named_parameters`, and the adapters' buffers: persistent ones and `training_buffers`."""
    state = named_parameters(attached)
    known = {id(t) for t in state.values()}
    for a in attached:
        for site, (_, adapter) in a.parts.items():
            tensors = {
                **adapter.state_dict(keep_vars=True),
                **{name: adapter.get_buffer(name) for name in adapter.training_buffers},
            }
            for key, tensor in tensors.items():
                if id(tensor) not in known:
                    known.add(id(tensor))
                    state[f"{a.name}/{site}:{key}"] = tensor
    return state


def add_penalties(loss: LossStep, attached: Sequence[Attachment]) -> LossStep:
    """The loss plus the penalty terms of the methods."""
    regularized = [a for a in attached if type(a.method).penalty is not Method.penalty]

    def penalized_loss(step: int, rows: list[int]) -> Tensor:
        terms = (a.penalty() for a in regularized)
        return sum((term for term in terms if term is not None), loss(step, rows))

    return penalized_loss if regularized else loss


def check_first_gradients(loss: LossStep, attached: Sequence[Attachment]) -> LossStep:
    """The loss; its first call checks that every layer of the base model passes gradients, else raises `BlockedGradient`."""
    towers = list({id(tower): tower for a in attached for tower in a.towers.values()}.values())

    def checked_loss(step: int, rows: list[int]) -> Tensor:
        with check_gradient_flow(towers):
            result = loss(step, rows)
        towers.clear()  # only the first call is checked
        return result

    return checked_loss


def select_entries(
    loss: LossStep,
    sample_loss: LossStep,
    attached: Sequence[Attachment],
    config: TrainConfig,
    accelerator: Accelerator,
    count: int | None = None,
) -> LossStep:
    """The loss; before its first call, methods with `selects` select the entries that they train, unless a checkpoint has them.

    Args:
        loss: called in each step. `sample_loss`: for the selection, without penalties: of sample n of the run, (step, row).
        count: number of different samples; None if every sample of the run has other noise.
    """
    pending = [a for a in attached if a.method.selects]

    def losses() -> Iterator[Tensor]:
        for n in itertools.count() if count is None else range(count):
            step, row = divmod(n, config.samples)
            torch.manual_seed(mix(config.seed, step, "torch", row))
            yield sample_loss(step, [row])

    devices = [accelerator.device] if accelerator.device.type == "cuda" else []

    def selected_loss(step: int, rows: list[int]) -> Tensor:
        with torch.random.fork_rng(devices, enabled=bool(pending)):
            for a in pending:
                if not a.is_selected:
                    a.select(losses())
                    tensors = [t for _, adapter in a.parts.values() for t in (*adapter.buffers(), *adapter.parameters())]
                    broadcast_start(accelerator, list({id(tensor): tensor for tensor in tensors}.values()))
        pending.clear()
        return loss(step, rows)

    return selected_loss if pending else loss


def after_step(attached: Sequence[Attachment]) -> Callable[[int, int], None] | None:
    """The `after_step` callback of `Trainer` that calls the methods' own; None if no method has one."""
    own = [a for a in attached if type(a.method).after_step is not Method.after_step]

    def call(step: int, steps: int) -> None:
        for a in own:
            a.after_step(step, steps)

    return call if own else None


def finalize(attached: Sequence[Attachment]) -> None:
    """Runs the last change of the adapters of a finished run; see `Attachment.finalize`."""
    for a in attached:
        a.finalize()


def parameter_groups(
    attached: Sequence[Attachment], rates: Mapping[str, float], text_rate: float, base: float
) -> list[ParameterGroup]:
    """Parameter groups whose `lr_scale` is relative to the learning rate `base`.

    Args:
        rates: method name to learning rate. `text_rate`: learning rate of weights in text encoders.
    """
    return [group for a in attached for group in _groups(a, rates[a.method.name], text_rate, base)]


def _groups(attachment: Attachment, rate: float, text_rate: float, base: float) -> Iterator[ParameterGroup]:
    component = {id(p): site.component for site, adapter in attachment.parts.values() for p in adapter.parameters()}
    on_weights = not trains_token_embeddings(attachment.method)
    for group in attachment.groups():
        in_text = [p for p in group["params"] if on_weights and component.get(id(p), "").startswith("text_encoder")]
        text_ids = {id(p) for p in in_text}
        others = [p for p in group["params"] if id(p) not in text_ids]
        for params, learning_rate, label in ((others, rate, attachment.name), (in_text, text_rate, f"{attachment.name}.text")):
            if params:
                yield scaled_group(group, params, learning_rate / base, label)


def scaled_group(group: Mapping[str, Any], params: Sequence[Tensor], factor: float, name: str) -> ParameterGroup:
    """Some parameters of a method's group, with `lr_scale` times `factor`, and the weight decay of the group if it has one."""
    scaled: ParameterGroup = {"params": params, "lr_scale": group.get("lr_scale", 1.0) * factor, "name": name}
    if "weight_decay" in group:
        scaled["weight_decay"] = group["weight_decay"]
    return scaled
