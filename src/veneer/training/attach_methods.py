"""Methods by name, built and attached to a pipeline for training."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from veneer.formats._core.options import validate_options
from veneer.injection import Attachment, attach, methods
from veneer.injection.attachment.plan import effective_where, hosts_for
from veneer.injection.errors import OptionError
from veneer.injection.method import Method
from veneer.injection.select import NOT
from veneer.injection.sites import VocabularySite
from veneer.methods.additive.bottleneck.adapter_drop import AdapterDrop, skip_layers
from veneer.methods.prompt._tokenizer import check_new_token

from .loop.seeds import mix
from .method_names import split_methods

TEXT = ("text*/attn",)
"""Default sites in text encoders, for methods that support them."""
MODELS = ("diffusers_dit", "diffusers_unet", "clip_text")
"""Hosts of the models in a pipeline."""


def check_options(name: str, options: Mapping[str, Any]) -> Method:
    """The method with these options. Also checks the types of its options by site, which otherwise fail only in `attach`.

    Raises:
        OptionError: a value of the wrong type. UnknownOption: there is no such option.
    """
    validate_options(methods.get(name), {"by_site": options.get("by_site", {})})
    return methods.get(name).from_config(options)


def build_methods(
    words: str, options: Mapping[str, Mapping[str, Any]], token: str | tuple[str, ...], word: str | tuple[str, ...]
) -> list[Method]:
    """Configs of the methods named in `words`.

    Args:
        options: method name to its options.
        token, word: trained tokens and initializer words of methods with token embeddings, unless set in `options`.
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


def _in_text(pattern: str) -> str:
    """A default pattern, restricted to the text encoders."""
    return f"{NOT}text*/{pattern.removeprefix(NOT)}" if pattern.startswith(NOT) else f"text*/{pattern}"


def _only_in_text(pipe: Any, method: Method) -> list[str]:
    """Default selection in text encoders, if the method has no default site in the other models of the pipeline."""
    if effective_where(pipe, method, method.default, method.fallback):
        return []
    return [*effective_where(pipe, method, [_in_text(each) for each in method.default])]


def attach_all(
    pipe: Any, configs: Sequence[Method], where: Mapping[str, Sequence[str]], text_encoder: bool, seed: int
) -> list[Attachment]:
    """Attaches the methods with seeded initialization; adapters are in training mode, the base model is not.

    Args:
        configs: the methods, as `build_methods` returns them.
        where: method name to its selection (default: that of the method).
        text_encoder: also adapt the attention of the text encoders, or the method's default sites there if it has none in
            attention. Methods with token embeddings are not affected. A method that has default sites in text encoders only,
            such as `special_tokens` on Stable Diffusion, adapts them there in any case.
    """
    attached = []
    for method in configs:
        selection = [*where.get(method.name, ())]
        if text_encoder and not trains_token_embeddings(method):
            default = selection or effective_where(pipe, method, method.default, method.fallback)
            selection = [*default, *(effective_where(pipe, method, TEXT, [_in_text(each) for each in method.default]) or TEXT)]
        elif not selection:
            selection = _only_in_text(pipe, method)
        torch.manual_seed(mix(seed, "adapters", method.name))
        attachment = attach(pipe, method, where=selection or None)
        for _, adapter in attachment.parts.values():
            adapter.train()
        attachment.begin_pass(seed, 0)  # for passes before training, such as estimates
        attached.append(attachment)
    return attached


def skip_lower_layers(attached: Sequence[Attachment], layers: int) -> None:
    """Leaves out the adapters of the first layers, of all attachments of `adapter_drop`; 0 for none.

    Raises:
        OptionError: none of them is of this method, or the number is negative.
    """
    drops = [a for a in attached if a.method.name == AdapterDrop.name]
    if layers and not drops:
        given = tuple(a.method.name for a in attached)
        message = (
            f"skip_layers: the adapters are of {', '.join(given) or 'no method'}; expected {AdapterDrop.name}, which is trained "
            "with layers left out."
        )
        raise OptionError(message, option="skip_layers", given=given, expected=AdapterDrop.name)
    for attachment in drops if layers else ():
        skip_layers(attachment, layers)


@functools.cache
def trainable_methods(hosts: tuple[str, ...] = MODELS) -> tuple[str, ...]:
    """Names of the methods that `personalize` supports: on a diffusion model or its text encoders, or on token embeddings.

    Args:
        hosts: those of the models in the pipeline, such as only the UNet's and the text encoder's.
    """
    classes = {name: methods.get(name) for name in methods.names()}
    excluded = ("conditions", "prepares", "keeps_head", "needs_tasks")
    candidates = {name: cls for name, cls in classes.items() if not any(getattr(cls, each) for each in excluded)}
    return tuple(name for name, cls in candidates.items() if trains_token_embeddings(cls) or hosts_for(cls, hosts))
