"""Search for methods, which ranks matches of names before those of titles and docstrings, and groups of methods by use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from veneer.method_catalog import MethodEntry


@dataclass(frozen=True)
class Use:
    """A group of methods with the same use.

    Args:
        title: heading of the group.
        about: how to choose among the methods.
        methods: method names, recommended ones first.
        words: search terms that the docstrings do not have.
    """

    title: str
    about: str
    methods: tuple[str, ...]
    words: str


DIFFUSION = "diffusion stable sd sdxl sd3 flux generate generation text-to-image"
CLASSES = "classification classify classifier labels recognition vit"
USES = (
    Use(
        "A subject or a style from a few photos",
        "For Stable Diffusion, FLUX and other diffusion models. Start with lora; add textual_inversion for a trigger token.",
        (
            "lora",
            "textual_inversion",
            "dora",
            "loha",
            "lokr",
            "oft",
            "boft",
            "svdiff",
            "diffusekrona",
            "ia3",
            "glora",
            "vera",
            "adalora",
            "lora_fa",
        ),
        f"{DIFFUSION} subject style artist face faces person people character object pet toy photo photos concept dreambooth "
        "personalize personalization trigger token embedding lycoris pivotal",
    ),
    Use(
        "Control by a map or an image",
        "The result follows edges, depth, a sketch or another image. Start with controlnet; ip_adapter for a reference image.",
        ("controlnet", "t2i_adapter", "controlnext", "ip_adapter"),
        f"{DIFFUSION} control condition conditioning edges canny depth pose sketch lines map reference image prompt composition",
    ),
    Use(
        "Image classification",
        "For vision transformers and convolutional networks. Start with linear_probe; then lora, vpt or adaptformer.",
        (
            "linear_probe",
            "vpt",
            "adaptformer",
            "ssf",
            "bitfit",
            "norm_tuning",
            "convpass",
            "repadapter",
            "fact",
            "adapter_plus",
            "pfeiffer",
            "houlsby",
            "full",
        ),
        f"{CLASSES} fine-tuning finetuning transfer vision transformer dataset accuracy",
    ),
    Use(
        "CLIP with few images per class",
        "Class names and a few labeled images are enough. Start with tip_adapter, which trains in seconds.",
        ("tip_adapter", "coop", "cocoop", "clip_adapter"),
        f"{CLASSES} clip few shot few-shot zero-shot open_clip class names prompts",
    ),
    Use(
        "Classification with little memory, or without access to the layers",
        "Side networks need no gradients in the frozen model; pixel prompts change only its input.",
        ("lst", "dtl", "evp", "ilm_vp", "dam_vp"),
        f"{CLASSES} memory side network black box visual prompt pixels border frame",
    ),
)
OTHERS = Use("From other packages", "", (), "")
SUGGESTIONS = (
    ("A subject or a style from your photos", ("lora", "textual_inversion")),
    ("Images that follow a sketch, edges or depth", ("controlnet",)),
    ("Images in the style of a reference image", ("ip_adapter",)),
    ("Classes of images, with a labeled folder", ("linear_probe", "lora", "vpt")),
    ("Classes of images, with a few images each", ("tip_adapter", "coop")),
)
"""Task to the methods that are recommended first."""
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
    order = {name: i for i, name in enumerate(name for use in USES for name in use.methods)}
    matching = [(score, method) for score, method in scored if score]
    matching.sort(key=lambda pair: (-pair[0], order.get(pair[1].name, len(order)), pair[1].name))
    return [method for _, method in matching] or _similar(methods, "".join(terms))


def group_by_use(methods: Iterable[MethodEntry]) -> list[tuple[Use, list[MethodEntry]]]:
    """The methods by use, recommended ones first; uses without a method are left out."""
    by_name = {method.name: method for method in methods}
    groups = [(use, [by_name.pop(name) for name in use.methods if name in by_name]) for use in USES]
    groups.append((OTHERS, [*by_name.values()]))
    return [(use, members) for use, members in groups if members]


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
    if set(terms) <= set(_terms(_uses(method.name))):
        return 40
    return ANYWHERE if _has_all(f"{method.name} {method.about} {method.paper} {method.text} {_uses(method.name)}", terms) else 0


def _has_all(text: str, terms: list[str]) -> bool:
    text = " ".join(_terms(text))
    return all(term in text for term in terms)


def _uses(name: str) -> str:
    return " ".join(f"{use.title} {use.words}" for use in USES if name in use.methods)


def _similar(methods: Sequence[MethodEntry], name: str) -> list[MethodEntry]:
    by_name = {"".join(_terms(method.name)): method for method in methods}
    return [by_name[match] for match in difflib.get_close_matches(name, by_name, n=3, cutoff=0.7)]


def _terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("_", " "))
