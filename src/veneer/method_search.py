"""Search for methods, which ranks matches of names before those of titles and docstrings, and groups of methods by use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from veneer.method_catalog import MethodEntry


@dataclass(frozen=True)
class Use:
    """A group of methods with the same use; its members are the methods that name its key in `Method.uses`.

    Args:
        key: as in `Method.uses`.
        title: heading of the group.
        about: how to choose among the methods.
        words: search terms that the docstrings do not have.
    """

    key: str
    title: str
    about: str
    words: str


DIFFUSION = "diffusion stable sd sdxl sd3 flux generate generation text-to-image"
CLASSES = "classification classify classifier labels recognition vit"
USES = (
    Use(
        "few_photos",
        "A subject or a style from a few photos",
        "For Stable Diffusion, FLUX and other diffusion models. Start with lora; add textual_inversion for a trigger token.",
        f"{DIFFUSION} subject style artist face faces person people character object pet toy photo photos concept dreambooth "
        "personalize personalization trigger token embedding lycoris pivotal",
    ),
    Use(
        "style",
        "A style",
        "Weight updates of all attention layers, or a reference image at generation.",
        f"{DIFFUSION} style artist look",
    ),
    Use(
        "control",
        "Control by a map or an image",
        "The result follows edges, depth, a sketch or another image. Start with controlnet; ip_adapter for a reference image.",
        f"{DIFFUSION} control condition conditioning edges canny depth pose sketch lines map reference image prompt composition",
    ),
    Use(
        "classification",
        "Image classification",
        "For vision transformers and convolutional networks. Start with linear_probe; then lora, vpt or adaptformer.",
        f"{CLASSES} fine-tuning finetuning transfer vision transformer dataset accuracy",
    ),
    Use(
        "few_labels",
        "CLIP with few images per class",
        "Class names and a few labeled images are enough. Start with tip_adapter, which trains in seconds.",
        f"{CLASSES} clip few shot few-shot zero-shot open_clip class names prompts",
    ),
    Use(
        "low_memory",
        "Classification with little memory, or without access to the layers",
        "Side networks need no gradients in the frozen model; pixel prompts change only its input.",
        f"{CLASSES} memory side network black box visual prompt pixels border frame",
    ),
    Use(
        "smallest_file",
        "The smallest file",
        "Kilobytes instead of megabytes: token embeddings, biases, scales and shared factors.",
        "small smallest tiny file size kilobytes storage",
    ),
)
OTHERS = Use("", "From other packages", "", "")
ANYWHERE = 20
"""Score of a method with the search terms anywhere in its docstring."""


def rank_methods(methods: Sequence[MethodEntry], query: str) -> list[MethodEntry]:
    """The methods that match a query, best match first. Without a match, the methods with similar names.

    Ranking, from best to worst: the name or the short name of the title equals the query; starts with it; has all its terms; the
    paper's title has the query as whole words; title or paper have all terms; the terms are known for the method's use; the
    docstring has all terms.

    >>> from veneer.method_catalog import catalog
    >>> [method.name for method in rank_methods(catalog(), "VPT")][0]
    'vpt'
    """
    terms = _terms(query)
    if not terms:
        return list(methods)
    scored = [(_score(method, terms), method) for method in methods]
    matching = [(score, method) for score, method in scored if score]
    matching.sort(key=lambda pair: (-pair[0], _position(pair[1])))
    return [method for _, method in matching] or _similar(methods, "".join(terms))


def group_by_use(methods: Iterable[MethodEntry]) -> list[tuple[Use, list[MethodEntry]]]:
    """The methods by their main use, recommended ones first; uses without a method are left out."""
    groups: dict[str, list[MethodEntry]] = {use.key: [] for use in (*USES, OTHERS)}
    for method in sorted(methods, key=_position):
        groups[_main_use(method)].append(method)
    return [(use, groups[use.key]) for use in (*USES, OTHERS) if groups[use.key]]


def with_use(methods: Iterable[MethodEntry], key: str) -> list[MethodEntry]:
    """The methods that have a use, recommended ones first; a method may have several uses."""
    having = [method for method in methods if key in method.uses]
    return sorted(having, key=lambda method: (key not in method.recommended_for, key != method.uses[0], _position(method)))


def _main_use(method: MethodEntry) -> str:
    known = {use.key for use in USES}
    return next((key for key in method.uses if key in known), OTHERS.key)


def _position(method: MethodEntry) -> tuple[int, bool, str]:
    """Sort key: by main use, recommended ones first, then by name."""
    keys, main = [use.key for use in USES], _main_use(method)
    return keys.index(main) if main in keys else len(keys), main not in method.recommended_for, method.name


def _score(method: MethodEntry, terms: list[str]) -> int:
    title = method.about.partition(":")[0]
    names, joined = ["".join(_terms(name)) for name in (method.name, title)], "".join(terms)
    if joined in names:
        return 100
    if any(name.startswith(joined) for name in names):
        return 90
    if _has_all(f"{method.name} {title}", terms):
        return 80
    if f" {' '.join(terms)} " in f" {' '.join(_terms(method.paper))} ":
        return 60
    if _has_all(f"{method.about} {method.paper}", terms):
        return 50
    if set(terms) <= set(_terms(_uses(method))):
        return 40
    return ANYWHERE if _has_all(f"{method.name} {method.about} {method.paper} {method.text} {_uses(method)}", terms) else 0


def _has_all(text: str, terms: list[str]) -> bool:
    text = " ".join(_terms(text))
    return all(term in text for term in terms)


def _uses(method: MethodEntry) -> str:
    return " ".join(f"{use.title} {use.words}" for use in USES if use.key in method.uses)


def _similar(methods: Sequence[MethodEntry], name: str) -> list[MethodEntry]:
    by_name = {"".join(_terms(method.name)): method for method in methods}
    return [by_name[match] for match in difflib.get_close_matches(name, by_name, n=3, cutoff=0.7)]


def _terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("_", " "))
