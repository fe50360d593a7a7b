"""Finding a method: groups by use, and a search that ranks names before titles before docstrings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from veneer.method_catalog import Described


@dataclass(frozen=True)
class Use:
    """What a group of methods is for.

    Args:
        title: a heading. `about`: how to choose among them. `methods`: the first to try first.
        words: that people search for and docstrings lack.
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
START = (
    ("A subject or a style from your photos", ("lora", "textual_inversion")),
    ("Images that follow a sketch, edges or depth", ("controlnet",)),
    ("Images in the manner of a reference image", ("ip_adapter",)),
    ("Classes of images, with a labeled folder", ("linear_probe", "lora", "vpt")),
    ("Classes of images, with a few images each", ("tip_adapter", "coop")),
)
"""What people come with, and the methods to try first."""
ANYWHERE = 20
"""Score of a method that has the words somewhere in its docstring."""


def rank_methods(found: Sequence[Described], query: str) -> list[Described]:
    """The methods that match a search, the best match first; without a match those of the nearest name.

    In this order: the name or the short name of its title is the query; begins with it; has all its words; the paper's title has
    the query as whole words; title or paper have all words; its use is known by them; its docstring has all of them.

    >>> from veneer.method_catalog import catalogue
    >>> [method.name for method in rank_methods(catalogue(), "VPT")][0]
    'vpt'
    """
    words = _words(query)
    if not words:
        return list(found)
    scored = [(_score(method, words), method) for method in found]
    order = {name: i for i, name in enumerate(name for use in USES for name in use.methods)}
    matching = [(score, method) for score, method in scored if score]
    matching.sort(key=lambda each: (-each[0], order.get(each[1].name, len(order)), each[1].name))
    return [method for _, method in matching] or _nearest(found, "".join(words))


def group_by_use(found: Iterable[Described]) -> list[tuple[Use, list[Described]]]:
    """The groups that have any of these methods, each with its methods, the first to try first."""
    by_name = {method.name: method for method in found}
    groups = [(use, [by_name.pop(name) for name in use.methods if name in by_name]) for use in USES]
    groups.append((OTHERS, [*by_name.values()]))
    return [(use, methods) for use, methods in groups if methods]


def _score(method: Described, words: list[str]) -> int:
    title = method.about.partition(":")[0]
    names, joined = ["".join(_words(name)) for name in (method.name, title)], "".join(words)
    if joined in names:
        return 100
    if any(name.startswith(joined) for name in names):
        return 90
    if _has(f"{method.name} {title}", words):
        return 80
    if f" {' '.join(words)} " in f" {' '.join(_words(method.paper))} ":
        return 60
    if _has(f"{method.about} {method.paper}", words):
        return 50
    if _used_for(method.name, words):
        return 40
    return ANYWHERE if _has(f"{method.name} {method.about} {method.paper} {method.text} {_uses(method.name)}", words) else 0


def _has(text: str, words: list[str]) -> bool:
    text = " ".join(_words(text))
    return all(word in text for word in words)


def _used_for(name: str, words: list[str]) -> bool:
    known = set(_words(_uses(name)))
    return all(word in known for word in words)


def _uses(name: str) -> str:
    return " ".join(f"{use.title} {use.words}" for use in USES if name in use.methods)


def _nearest(found: Sequence[Described], word: str) -> list[Described]:
    by_name = {"".join(_words(method.name)): method for method in found}
    return [by_name[name] for name in difflib.get_close_matches(word, by_name, n=3, cutoff=0.7)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower().replace("_", " "))
