"""Further concepts of a run: photos of each, with a concept and a class word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from veneer.injection import OptionError
from veneer.training.data.photo_folder import READ

from ...limits import LIMITS
from ...workspace import Workspace, check_text, printable
from ..shared.html import table
from ..shared.photo_upload import Rows, save_photos

MAX_GROUPS = 3
"""Concepts of a run besides the first one."""
KEYS = ("concept", "class_word")
"""Accepted options of a dataset in a config file."""


@dataclass(frozen=True)
class ConceptGroup:
    """A further concept of a training request.

    Args:
        concept: trigger token. `class_word`: ordinary word for it. `photos`: uploaded files.
    """

    concept: str
    class_word: str = ""
    photos: tuple[str, ...] = ()


def check_groups(concept: str, groups: Sequence[ConceptGroup]) -> None:
    """Checks the concepts of a run.

    Args:
        concept: the first one.
    Raises:
        OptionError: an empty concept, two equal ones, or a comma, which separates the options of a dataset.
    """
    seen = {concept}
    for number, group in enumerate(groups, 2):
        where = f"concept {number}"
        name = check_text(group.concept, where)
        if not name or name in seen:
            message = f"{where} is {printable(name)!r}; expected a new, unique name such as <toy>."
            raise OptionError(message, option="concept", where=where, given=name, expected="a unique name")
        seen.add(name)
    for text in (*seen, *(check_text(group.class_word, "class word") for group in groups)) if groups else ():
        if "," in text:
            message = f"{printable(text)!r} has a comma; expected a concept or class word without one."
            raise OptionError(message, option="concept", where=text, given=text, expected="no comma")


def dataset_flags(concept: str, class_word: str, groups: Sequence[ConceptGroup], folders: Sequence[Path]) -> list[str]:
    """`--datasets` with the photos of each concept in a folder."""
    subjects = [(concept, class_word), *((group.concept.strip(), group.class_word.strip()) for group in groups)]
    texts = []
    for (token, word), folder in zip(subjects, folders, strict=True):
        words = {"concept": token, **({"class_word": word} if word else {})}
        texts.append(",".join([f"path={folder}", *(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in words.items())]))
    return ["--datasets", *texts]


def save_groups(workspace: Workspace, paths: Sequence[str], captions: Rows, groups: Sequence[ConceptGroup]) -> tuple[Path, ...]:
    """Saves the photos of the first concept and those of the groups; returns their folders.

    Raises:
        VeneerError: as for `save_photos`; nothing is saved then.
    """
    folders = list[Path]()
    try:
        folders.append(save_photos(workspace, paths, captions))
        folders.extend(save_photos(workspace, group.photos, []) for group in groups)
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return tuple(folders)


def groups_to_tables(concept: str, class_word: str, groups: Sequence[ConceptGroup]) -> dict[str, Any]:
    """Entry of a config file for several concepts, without the folders of their photos; empty for one concept."""
    subjects = [(concept, class_word), *((group.concept, group.class_word) for group in groups)]
    return {"datasets": [dict(zip(KEYS, subject, strict=True)) for subject in subjects]} if groups else {}


def groups_of_tables(content: Mapping[str, Any]) -> tuple[list[ConceptGroup], list[str]]:
    """Concepts of the datasets in a config file, and the options of datasets that are left out.

    Raises:
        OptionError: more concepts than the form has.
    """
    tables = [each for each in content.get("datasets") or () if isinstance(each, Mapping)]
    if len(tables) > MAX_GROUPS + 1:
        message = f"datasets: {len(tables)} of them; expected at most {MAX_GROUPS + 1}."
        raise OptionError(message, option="datasets", given=len(tables), expected=MAX_GROUPS + 1)
    left_out = [f"datasets[{i}].{key}" for i, each in enumerate(tables) for key in each if key.replace("-", "_") not in KEYS]
    return [ConceptGroup(str(t.get("concept") or ""), str(t.get("class_word") or "")) for t in tables], left_out


def concept_scores(result: Mapping[str, Any]) -> str:
    """Table of the scores of each concept of a finished run, in HTML; empty for one concept."""
    rows = []
    for each in result.get("concepts") or ():
        metrics = each.get("metrics") or {}
        similarity, prompt = (_means(metrics.get(name)) for name in ("similarity", "prompt_similarity"))
        rows.append((str(each.get("token")), int(each.get("photos") or 0), *similarity, prompt[0]))
    head = ("concept", "photos", "similarity to its photos", "without the adapter", "similarity to the prompt")
    return table("Scores of each concept", head, rows) if rows else ""


def _means(scores: Any) -> tuple[str, str]:
    """Mean with and without the adapter."""
    if not isinstance(scores, Mapping):
        return "–", "–"
    return f"{scores['adapted']['mean']:.2f}", f"{scores['base']['mean']:.2f}"


class ConceptFields:
    """Fields for further concepts, in a closed accordion."""

    def __init__(self) -> None:
        self.components: list[Any] = []
        with gr.Accordion("More concepts in this run", open=False):
            gr.Markdown("Photos of each further subject, with its concept and class word. One adapter is trained on all of them.")
            for number in range(2, MAX_GROUPS + 2):
                files = gr.File(
                    label=f"Photos of concept {number}", file_count="multiple", file_types=sorted(READ), height=110,
                    elem_id=f"train-photos-{number}", interactive=True,
                )  # fmt: skip
                with gr.Row():
                    short: dict[str, Any] = {"max_length": LIMITS.text, "min_width": 140}
                    concept = gr.Textbox(label=f"Concept {number}", elem_id=f"train-concept-{number}", **short)
                    word = gr.Textbox(label=f"Class word {number}", elem_id=f"train-word-{number}", **short)
                self.components += [files, concept, word]

    @staticmethod
    def read(entries: Sequence[Any]) -> tuple[ConceptGroup, ...]:
        """The groups with a concept or photos, for the values of the components."""
        rows = zip(entries[::3], entries[1::3], entries[2::3], strict=True)
        return tuple(ConceptGroup(str(c or ""), str(w or ""), tuple(f or ())) for f, c, w in rows if f or str(c or "").strip())

    @staticmethod
    def values(groups: Sequence[ConceptGroup]) -> list[Any]:
        """Values of the components; uploaded photos stay."""
        padded = [*groups, *[ConceptGroup("")] * (MAX_GROUPS - len(groups))]
        return [value for group in padded for value in (gr.skip(), group.concept, group.class_word)]
