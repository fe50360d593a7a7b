"""Several concepts in one run of the page Train: their photos, the command, and the scores of each."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from veneer.apps.context import Context
from veneer.apps.limits import LIMITS
from veneer.apps.pages.personalize import personalize_page
from veneer.apps.pages.personalize.concept_groups import MAX_GROUPS, ConceptFields, ConceptGroup, concept_scores
from veneer.apps.pages.personalize.config_files import form_to_toml, load_config
from veneer.apps.pages.personalize.request import PersonalizeRequest, command
from veneer.apps.pages.personalize.results import result_values
from veneer.apps.pages.shared.job_view import delete_job
from veneer.apps.pages.shared.verdict import read_result

from tests.apps.test_personalize_config import request
from tests.apps.test_personalize_page import until_ended
from tests.methods.controls import picture
from tests.raising import raises
from veneer.cli import parser_for
from veneer.injection import OptionError, VeneerError
from veneer.testing.pipelines import tiny_pipeline


def photo(folder: Path, number: int) -> str:
    picture(number, 96).save(folder / f"{number}.png")
    return str(folder / f"{number}.png")


def form(*groups: ConceptGroup, **settings: Any) -> PersonalizeRequest:
    return replace(request(**settings), groups=groups)


def datasets(words: list[str]) -> list[dict[str, Any]]:
    return list(vars(parser_for(words).parse_args(words))["datasets"])


def test_command_has_a_dataset_for_each_concept(tmp_path: Path) -> None:
    words = command(form(ConceptGroup("<cup>", "cup"), ConceptGroup("123 a=b")), tmp_path / "1", [tmp_path / "2", tmp_path / "3"])
    assert datasets(words) == [
        {"path": str(tmp_path / "1"), "concept": "<toy>", "class_word": "toy"},
        {"path": str(tmp_path / "2"), "concept": "<cup>", "class_word": "cup"},
        {"path": str(tmp_path / "3"), "concept": "123 a=b"},
    ]
    assert vars(parser_for(words).parse_args(words))["photos"] is None


@pytest.mark.parametrize(
    ("group", "given"),
    [
        (ConceptGroup("<toy>"), "<toy>"),
        (ConceptGroup(" "), ""),
        (ConceptGroup("<a>,path=/etc"), "<a>,path=/etc"),
        (ConceptGroup("<a>", "b,path=/etc"), "b,path=/etc"),
    ],
)
def test_invalid_concepts_are_rejected(group: ConceptGroup, given: str, tmp_path: Path) -> None:
    with raises(OptionError, option="concept", given=given):
        command(form(group), tmp_path)


def test_fields_with_photos_or_a_concept_are_groups() -> None:
    none = [None, "", ""]
    assert ConceptFields.read(none * MAX_GROUPS) == ()
    groups = ConceptFields.read([*none, ["a.png"], "", "cup", None, "<b>", ""])
    assert groups == (ConceptGroup("", "cup", ("a.png",)), ConceptGroup("<b>"))
    assert ConceptFields.values(groups)[1::3] == ["", "<b>", ""]


def test_concepts_survive_the_config_file(tmp_path: Path) -> None:
    made = form(ConceptGroup("<cup>", "cup", ("photo.png",)))
    workspace = Context.create(tmp_path / "app").workspace(None)
    (tmp_path / "run.toml").write_text(form_to_toml(made))
    loaded = load_config(workspace, tmp_path / "run.toml")
    assert loaded.left_out == ()
    assert loaded.request.groups == (ConceptGroup("<cup>", "cup"),), "its photos have to be added"
    assert (loaded.request.concept, loaded.request.class_word) == ("<toy>", "toy")
    (tmp_path / "more.toml").write_text("".join(f'[[datasets]]\nconcept = "<{n}>"\n' for n in range(MAX_GROUPS + 2)))
    with raises(OptionError, option="datasets", given=MAX_GROUPS + 2, expected=MAX_GROUPS + 1):
        load_config(workspace, tmp_path / "more.toml")


def test_rejected_groups_leave_no_photos(tmp_path: Path) -> None:
    context = Context.create(tmp_path / "app")
    workspace = context.workspace(None)
    for photos in ((), tuple([photo(tmp_path, 0)] * (LIMITS.photos + 1))):
        with raises(VeneerError, where="photos"):
            made = form(ConceptGroup("<cup>", "cup", photos))
            personalize_page.start_job(context, workspace, [photo(tmp_path, 1)], [], made)
    assert not [*workspace.datasets.iterdir()]


def test_scores_of_each_concept() -> None:
    means = {"adapted": {"mean": 0.75}, "base": {"mean": 0.25}}
    concepts = [{"token": "<b>a</b>", "photos": 3, "metrics": {"similarity": means}}, {"token": "<cup>", "class_word": ""}]
    shown = concept_scores({"concepts": concepts})
    assert "&lt;b&gt;a&lt;/b&gt;" in shown
    assert "<td>0.75</td><td>0.25</td><td>–</td>" in shown
    assert concept_scores({"metrics": {}}) == ""


def test_train_two_concepts(tmp_path: Path) -> None:
    tiny_pipeline("sd").save_pretrained(tmp_path / "base")
    context = Context.create(tmp_path / "app")
    workspace = context.workspace(None)
    made = form(
        ConceptGroup("<cup>", "cup", (photo(tmp_path, 1), photo(tmp_path, 2))),
        steps="2", batch="1", resolution="32", eval_seeds="1", preview_every="0",
    )  # fmt: skip
    made = replace(made, base=str(tmp_path / "base"))
    job = personalize_page.start_job(context, workspace, [photo(tmp_path, 3)], [], made)
    folders = [Path(each["path"]) for each in datasets([*job.command])]
    assert [len([*folder.glob("*.png")]) for folder in folders] == [1, 2]
    until_ended(context, job)
    assert job.state == "done", job.log()
    assert [each["token"] for each in read_result(job)["concepts"]] == ["<toy>", "<cup>"]
    *_, judgment, _ = result_values(job)
    assert judgment.visible
    table = judgment.value.split("Scores of each concept</caption>")[1]
    assert re.findall("<td>&lt;(.*?)&gt;</td>", table) == ["toy", "cup"]
    (job.run / "result.json").write_text(json.dumps({"concepts": read_result(job)["concepts"]}))
    *_, judgment, _ = result_values(job)
    assert judgment.visible, "scores without a verdict"
    delete_job(workspace, job.name)
    assert not any(folder.exists() for folder in folders)
