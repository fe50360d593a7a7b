"""What a run trains: methods by name on a pipeline, and their learning rates."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.injection import Attachment, attach, methods
from veneer.injection.attachment.plan import effective_where
from veneer.injection.errors import OptionError
from veneer.injection.method import Method
from veneer.injection.select import NOT
from veneer.injection.sites import VocabularySite
from veneer.methods.prompt._tokenizer import refuse_taken

from .loop.optimizer_step import LossStep
from .loop.optimizers import Group
from .loop.seeds import mix
from .method_names import split_methods as split_methods

TEXT = ("text*/attn",)
"""What is adapted of text encoders where a method can."""


def build_methods(words: str, options: Mapping[str, Mapping[str, Any]], token: str, word: str) -> list[Method]:
    """The configs of the methods named in `words`.

    Args:
        options: method name to its options.
        token, word: what methods that learn tokens learn, and the word that it begins as, where `options` say nothing.
    Raises:
        VeneerError: options for a method that is not trained.
    """
    names = split_methods(words)
    stray = sorted(set(options) - set(names))
    if stray:
        message = f"options for {', '.join(stray)}, but the run trains {', '.join(names)}."
        raise OptionError(message, option="options", given=tuple(stray), expected=tuple(names))
    found = []
    for name in names:
        kind = methods.get(name)
        given = dict(options.get(name, {}))
        if learns_words(kind):
            given = {"tokens": token, "initialize": word, **given}
        found.append(kind.from_config(given))
    return found


def learns_words(method: type[Method] | Method) -> bool:
    """True for methods whose sites are vocabularies."""
    return any(issubclass(VocabularySite, need.site) for need in method.needs)


def new_token(concept: str, class_word: str, tokenizers: Sequence[Any]) -> str:
    """The token that methods with learned embeddings train for a concept.

    The concept itself where every tokenizer can take it as a new token, such as `<toy>` or `sks`. For ordinary words, white space
    or what the class word contains it is a placeholder, `<vase>` or `<my-vase>`: what the words mean to the base stays, and the
    class word still initializes the token.

    Args:
        tokenizers: of every text encoder; a method trains a row in each.
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
            refuse_taken(tokenizer, token, 1)
    except ValueError:
        return False
    return True


def freeze(pipe: Any) -> None:
    """Every part of a pipeline in `eval`, without gradients: what is trained is attached afterwards."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)


def checkpoint(tower: Any) -> None:
    """Have a tower recompute activations in the backward pass, for less memory.

    Raises:
        VeneerError: it cannot.
    """
    enable = getattr(tower, "enable_gradient_checkpointing", None) or getattr(tower, "gradient_checkpointing_enable", None)
    if enable is None:
        kind = type(tower).__name__
        message = f"{kind} has no gradient checkpointing. Leave out --gradient-checkpointing."
        raise OptionError(message, option="gradient_checkpointing", given=kind)
    enable()
    tower.training = True  # the flag that the towers look at; their parts stay in eval, so no dropout


def _in_text(pattern: str) -> str:
    """A pattern of a default, in the text encoders."""
    return f"{NOT}text*/{pattern.removeprefix(NOT)}" if pattern.startswith(NOT) else f"text*/{pattern}"


def attach_all(
    pipe: Any, found: Sequence[Method], where: Mapping[str, Sequence[str]], text_encoder: bool, seed: int
) -> list[Attachment]:
    """Attach the methods, seeded; adapters are in training mode, the base is not.

    Args:
        where: method name to its selection; the method's own default where there is none.
        text_encoder: methods on weights also adapt the attention of the text encoders, or there their default where they have no
            sites in attention.
    """
    attached = []
    for method in found:
        chosen = [*where.get(method.name, ())]
        if text_encoder and not learns_words(method):
            usual = chosen or effective_where(pipe, method, method.default, method.elsewhere)
            chosen = [*usual, *(effective_where(pipe, method, TEXT, [_in_text(each) for each in method.default]) or TEXT)]
        torch.manual_seed(mix(seed, "adapters", method.name))
        attachment = attach(pipe, method, where=chosen or None)
        for _, adapter in attachment.parts.values():
            adapter.train()
        attached.append(attachment)
    return attached


def named_parameters(attached: Sequence[Attachment]) -> dict[str, Tensor]:
    """`attachment/site:parameter` and the tensor."""
    return {f"{a.name}/{key}": p for a in attached for key, p in a.named_parameters()}


def named_state(attached: Sequence[Attachment]) -> dict[str, Tensor]:
    """All that a checkpoint must hold: `named_parameters`, and the adapters' buffers that are saved or `remembered`."""
    found = named_parameters(attached)
    known = {id(t) for t in found.values()}
    for a in attached:
        for site, (_, adapter) in a.parts.items():
            kept = {**adapter.state_dict(keep_vars=True), **{name: adapter.get_buffer(name) for name in adapter.remembered}}
            for key, tensor in kept.items():
                if id(tensor) not in known:
                    known.add(id(tensor))
                    found[f"{a.name}/{site}:{key}"] = tensor
    return found


def with_penalties(loss: LossStep, attached: Sequence[Attachment]) -> LossStep:
    """The loss with the methods' own terms added, each once a step."""
    own = [a for a in attached if type(a.method).penalty is not Method.penalty]

    def penalised(step: int, rows: list[int]) -> Tensor:
        terms = (a.penalty() for a in own)
        return sum((term for term in terms if term is not None), loss(step, rows))

    return penalised if own else loss


def after_step(attached: Sequence[Attachment]) -> Callable[[int, int], None] | None:
    """What the methods do after each step, for `Trainer`; None if none of them does anything."""
    own = [a for a in attached if type(a.method).after_step is not Method.after_step]

    def done(step: int, steps: int) -> None:
        for a in own:
            a.after_step(step, steps)

    return done if own else None


def parameter_groups(attached: Sequence[Attachment], rates: Mapping[str, float], text_rate: float, base: float) -> list[Group]:
    """Groups with the share of the learning rate `base` that each has.

    Args:
        rates: method name to learning rate. `text_rate`: of weights in text encoders.
    """
    return [group for a in attached for group in _groups(a, rates[a.method.name], text_rate, base)]


def _groups(attachment: Attachment, rate: float, text_rate: float, base: float) -> Iterator[Group]:
    tower = {id(p): site.component for site, adapter in attachment.parts.values() for p in adapter.parameters()}
    reads_text = not learns_words(attachment.method)
    for group in attachment.groups():
        in_text = [p for p in group["params"] if reads_text and tower.get(id(p), "").startswith("text_encoder")]
        mine = {id(p) for p in in_text}
        others = [p for p in group["params"] if id(p) not in mine]
        for params, speed, label in ((others, rate, attachment.name), (in_text, text_rate, f"{attachment.name}.text")):
            if params:
                yield {"params": params, "lr_scale": group.get("lr_scale", 1.0) * speed / base, "name": label}
