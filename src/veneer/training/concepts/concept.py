"""Concepts of a run and their trigger tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer import base_models
from veneer.injection.errors import OptionError

from ..attach_methods import new_token
from ..data.captions import rename_concept
from ..data.dataset_tables import RunOptions, dataset_tables

DEMO = {"concept": "<octopus>", "class_word": "fish"}
"""Default subject: the bundled example photos."""
TEXTS = ("template", "prompts")
"""Fields that contain the concept."""


@dataclass(frozen=True)
class Concept:
    """A subject or style.

    Args:
        token: its trigger token in prompts. `class_word`: ordinary word for it, or empty.
    """

    token: str
    class_word: str = ""


def concepts_of(config: RunOptions) -> tuple[Concept, ...]:
    """The concepts of a run, in the order of its datasets.

    Raises:
        OptionError: invalid datasets.
    """
    tables = [table for table in dataset_tables(config) if table.is_trained and table.concept]
    if not config.datasets:
        return (Concept(config.concept, config.class_word),)
    words: dict[str, str] = {}
    for table in tables:
        words[table.concept or ""] = words.get(table.concept or "") or table.class_word or ""
    return tuple(Concept(token, word) for token, word in words.items())


def default_subject(config: RunOptions) -> dict[str, Any]:
    """Photos, concept and class word of a run: the example photos by default. With several datasets, the concept is
    the configured one if a dataset has it, else that of the first.

    Raises:
        OptionError: photos without a concept, or invalid datasets.
    """
    if config.datasets:
        concepts = concepts_of(config)
        main = next((concept for concept in concepts if concept.token == config.concept), concepts[0])
        return {"concept": main.token, "class_word": main.class_word}
    if config.photos is None:
        return {"photos": base_models.examples(), **{name: getattr(config, name) or word for name, word in DEMO.items()}}
    if not config.concept:
        raise OptionError("no concept: set the trigger token of the subject, such as --concept '<toy>'.", option="concept")
    return {}


def new_tokens(concepts: Sequence[Concept], tokenizers: Sequence[Any]) -> dict[str, str]:
    """Concept to the token that methods with token embeddings train for it; see `new_token`.

    Raises:
        OptionError: two concepts get the same token.
    """
    names: dict[str, str] = {}
    for concept in concepts:
        token = new_token(concept.token, concept.class_word, tokenizers)
        if token in names.values():
            other = next(name for name, known in names.items() if known == token)
            message = f"concepts: {other!r} and {concept.token!r} both get the token {token}; expected different tokens."
            raise OptionError(message, option="concept", given=(other, concept.token), expected="different tokens")
        names[concept.token] = token
    return names


def rename_fields(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a config in which concepts have other tokens.

    Args:
        config: a `PersonalizeConfig`. `names`: concept to token.
    """
    known = {name: texts for name in TEXTS if (texts := getattr(config, name)) is not None}
    fields: dict[str, Any] = {n: tuple(rename_concepts(text, names) for text in texts) or None for n, texts in known.items()}
    tables = []
    for content, table in zip(config.datasets, dataset_tables(config), strict=False):
        own = dataclasses.replace(table, template=content.get("template") and table.template)
        texts = {"template": [rename_concepts(text, names) for text in own.template]} if own.template else {}
        tables.append({**content, "concept": names.get(table.concept or "", table.concept), **texts})
    return {"concept": names.get(config.concept, config.concept), "datasets": tuple(tables), **fields}


def rename_concepts(text: str, names: Mapping[str, str]) -> str:
    """The text with the tokens of concepts instead of their names."""
    for name, token in names.items():
        text = rename_concept(text, name, token) if name != token else text
    return text


def token_options(concepts: Sequence[Concept]) -> tuple[str | tuple[str, ...], str | tuple[str, ...]]:
    """Tokens and initializer words as methods with token embeddings have them: text for one concept, tuples for several."""
    if len(concepts) == 1:
        return concepts[0].token, concepts[0].class_word
    return tuple(concept.token for concept in concepts), tuple(concept.class_word for concept in concepts)
