"""Methods attached to a pipeline for training, and their parameter groups and learning rates."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.formats._core.options import validate_options
from veneer.injection import Attachment, attach, methods
from veneer.injection.attachment.gradient_flow import check_gradient_flow
from veneer.injection.attachment.plan import effective_where, hosts_for
from veneer.injection.errors import OptionError
from veneer.injection.method import Method
from veneer.injection.select import NOT
from veneer.injection.sites import VocabularySite
from veneer.methods.prompt._tokenizer import check_new_token

from .loop.optimizer_step import LossStep
from .loop.optimizers import ParameterGroup
from .loop.seeds import mix
from .method_names import split_methods as split_methods

TEXT = ("text*/attn",)
"""Default sites in text encoders, for methods that support them."""
DIFFUSION = ("diffusers_dit", "diffusers_unet")
"""Hosts of the models in a pipeline."""


def check_options(name: str, options: Mapping[str, Any]) -> Method:
    """The method with these options. Also checks the types of its options by site, which otherwise fail only in `attach`.

    Raises:
        OptionError: a value of the wrong type. UnknownOption: there is no such option.
    """
    validate_options(methods.get(name), {"by_site": options.get("by_site", {})})
    return methods.get(name).from_config(options)


def build_methods(words: str, options: Mapping[str, Mapping[str, Any]], token: str, word: str) -> list[Method]:
    """Configs of the methods named in `words`.

    Args:
        options: method name to its options.
        token, word: trained token and initializer token of methods with token embeddings, unless set in `options`.
    Raises:
        VeneerError: options for a method that is not trained.
    """
    names = split_methods(words)
    unknown = sorted(set(options) - set(names))
    if unknown:
        message = f"options for {', '.join(unknown)}, but the run trains {', '.join(names)}."
        raise OptionError(message, option="options", given=tuple(unknown), expected=tuple(names))
    configs = []
    for name in names:
        method = methods.get(name)
        settings = dict(options.get(name, {}))
        if trains_token_embeddings(method):
            settings = {"tokens": token, "initialize": word, **settings}
        configs.append(method.from_config(settings))
    return configs


def trains_token_embeddings(method: type[Method] | Method) -> bool:
    """True for methods whose sites are token-embedding tables."""
    return any(issubclass(VocabularySite, need.site) for need in method.needs)


def new_token(concept: str, class_word: str, tokenizers: Sequence[Any]) -> str:
    """The placeholder token that methods with token embeddings train for a concept.

    It is the concept itself if every tokenizer can add it as a new token, such as `<toy>` or `sks`. For ordinary words, several
    words or a part of the class word it is a placeholder, `<vase>` or `<my-vase>`: the words keep their meaning, and the class
    word still initializes the token.

    Args:
        tokenizers: one per text encoder; a method trains a row of each embedding table.
    """
    marked = concept.startswith("<") and concept.endswith(">") and len(concept.split()) == 1
    if marked or not concept.strip() or (_is_new(concept, tokenizers) and concept.lower() not in class_word.lower().split()):
        return concept
    stem = "-".join(re.findall(r"\w+", concept.lower())) or "concept"
    names = (f"<{stem}>" if i == 1 else f"<{stem}-{i}>" for i in itertools.count(1))
    return next(name for name in names if _is_new(name, tokenizers))


def _is_new(token: str, tokenizers: Sequence[Any]) -> bool:
    try:
        for tokenizer in tokenizers:
            check_new_token(tokenizer, token, 1)
    except ValueError:
        return False
    return True


def freeze(pipe: Any) -> None:
    """Sets every component of a pipeline to `eval` and disables its gradients; adapters are attached afterwards."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def enable_gradient_checkpointing(tower: Any) -> None:
    """Enables gradient checkpointing: activations are recomputed in the backward pass, which saves memory.

    Raises:
        VeneerError: the model does not support it.
    """
    enable = getattr(tower, "enable_gradient_checkpointing", None) or getattr(tower, "gradient_checkpointing_enable", None)
    if enable is None:
        kind = type(tower).__name__
        message = f"{kind} has no gradient checkpointing. Leave out --gradient-checkpointing."
        raise OptionError(message, option="gradient_checkpointing", given=kind)
    enable()
    tower.training = True  # only the flag that enables checkpointing; submodules stay in eval, without dropout


def _in_text(pattern: str) -> str:
    """A default pattern, restricted to the text encoders."""
    return f"{NOT}text*/{pattern.removeprefix(NOT)}" if pattern.startswith(NOT) else f"text*/{pattern}"


def attach_all(
    pipe: Any, configs: Sequence[Method], where: Mapping[str, Sequence[str]], text_encoder: bool, seed: int
) -> list[Attachment]:
    """Attaches the methods with seeded initialization; adapters are in training mode, the base model is not.

    Args:
        configs: the methods, as `build_methods` returns them.
        where: method name to its selection (default: that of the method).
        text_encoder: also adapt the attention of the text encoders, or the method's default sites there if it has none in
            attention. Methods with token embeddings are not affected.
    """
    attached = []
    for method in configs:
        selection = [*where.get(method.name, ())]
        if text_encoder and not trains_token_embeddings(method):
            default = selection or effective_where(pipe, method, method.default, method.fallback)
            selection = [*default, *(effective_where(pipe, method, TEXT, [_in_text(each) for each in method.default]) or TEXT)]
        torch.manual_seed(mix(seed, "adapters", method.name))
        attachment = attach(pipe, method, where=selection or None)
        for _, adapter in attachment.parts.values():
            adapter.train()
        attached.append(attachment)
    return attached


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


def after_step(attached: Sequence[Attachment]) -> Callable[[int, int], None] | None:
    """The `after_step` callback of `Trainer` that calls the methods' own; None if no method has one."""
    own = [a for a in attached if type(a.method).after_step is not Method.after_step]

    def call(step: int, steps: int) -> None:
        for a in own:
            a.after_step(step, steps)

    return call if own else None


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
                yield {"params": params, "lr_scale": group.get("lr_scale", 1.0) * learning_rate / base, "name": label}


@functools.cache
def trainable_methods() -> tuple[str, ...]:
    """Names of the methods that `personalize` supports: on weights of a diffusion model, or on token embeddings."""
    classes = {name: methods.get(name) for name in methods.names()}
    candidates = {name: cls for name, cls in classes.items() if not (cls.conditions or cls.prepares or cls.keeps_head)}
    return tuple(name for name, cls in candidates.items() if trains_token_embeddings(cls) or hosts_for(cls, DIFFUSION))
