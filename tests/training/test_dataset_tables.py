"""Tables of datasets: inheritance, flags, config files and errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.raising import raises
from veneer import OptionError
from veneer.cli import parser_for
from veneer.config_file import entries_of, read_config, to_toml
from veneer.flags import values
from veneer.training.concepts.concept import Concept, concepts_of, token_options
from veneer.training.data.dataset_tables import DatasetTable, dataset_tables
from veneer.training.personalization_config import PersonalizeConfig

TOY: dict[str, Any] = {"path": "toys", "concept": "<toy>", "class_word": "bear"}
CUP: dict[str, Any] = {"path": "cups", "concept": "<cup>"}


def config(*tables: dict[str, Any], **settings: Any) -> PersonalizeConfig:
    return PersonalizeConfig(datasets=tables, **settings)


def test_tables_inherit_the_options_of_the_run_and_override_them() -> None:
    run = config(
        {**TOY, "flip": 0.5, "resolution": 64}, {**CUP, "template": "my {concept}"}, flip=0.1, keep_tokens=2, resolution=128
    )
    toy, cup = dataset_tables(run)
    assert (toy.flip, cup.flip) == (0.5, 0.1)
    assert (toy.keep_tokens, cup.keep_tokens) == (2, 2)
    assert (toy.resolution, cup.resolution) == ((64,), (128,))
    assert cup.template == ("my {concept}",)
    assert cup.path == Path("cups")


def test_without_datasets_the_photos_are_one() -> None:
    (only,) = dataset_tables(PersonalizeConfig(photos=Path("a"), concept="<x>", class_word="y", crop="random"))
    assert (only.path, only.concept, only.class_word, only.crop) == (Path("a"), "<x>", "y", "random")


def test_concepts_are_those_of_datasets_with_subjects() -> None:
    more = {"path": "more toys", "concept": "<toy>"}
    run = config(TOY, CUP, more, {"path": "bears", "class_word": "bear", "regularization": True}, {"path": "b", "concept": ""})
    assert concepts_of(run) == (Concept("<toy>", "bear"), Concept("<cup>", ""))
    assert dataset_tables(run)[2].class_word == "bear", "the class word of the concept"
    assert token_options(concepts_of(run)) == (("<toy>", "<cup>"), ("bear", ""))
    assert token_options((Concept("<toy>", "bear"),)) == ("<toy>", "bear")


def test_the_first_concept_is_that_of_the_run() -> None:
    resolved = config(TOY, CUP, {"path": "without"}).with_defaults()
    assert (resolved.concept, resolved.class_word) == ("<toy>", "bear")
    assert dataset_tables(resolved)[2].concept == "<toy>"


def test_a_renamed_concept_is_renamed_in_its_own_table_and_texts(tmp_path: Path) -> None:
    from veneer.training.concepts.concept import rename_fields

    run = config({"path": "v", "concept": "vase", "template": ["a vase here"]}, TOY, prompts=("a vase", "a {concept}"))
    changed = rename_fields(run, {"vase": "<vase>", "<toy>": "<toy>"})
    assert [table["concept"] for table in changed["datasets"]] == ["<vase>", "<toy>"]
    assert changed["datasets"][0]["template"] == ["a <vase> here"]
    assert changed["prompts"] == ("a <vase>", "a {concept}")


@pytest.mark.parametrize(
    ("tables", "settings", "data"),
    [
        ([{"concept": "<a>"}], {}, {"where": "datasets[0].path", "given": None}),
        ([TOY, {**CUP, "repeat": 2}], {}, {"where": "datasets[1].repeat", "given": "datasets[1].repeat"}),
        ([{**TOY, "repeats": "two"}], {}, {"where": "datasets[0].repeats", "given": "two", "expected": "a whole number"}),
        ([{**TOY, "repeats": 0}], {}, {"where": "datasets[0].repeats", "given": 0, "expected": "at least 1"}),
        ([{**TOY, "flip": 2}], {}, {"where": "datasets[0].flip", "given": 2, "expected": "0 to 1"}),
        ([TOY, {**TOY, "class_word": "doll"}], {}, {"where": "datasets[1].class_word", "given": "doll", "expected": "bear"}),
        ([{"path": "a"}], {}, {"where": "datasets[0].concept", "given": ""}),
        ([{**TOY, "regularization": True}], {}, {"where": "datasets", "given": 1}),
        ([{**TOY, "regularization": True, "validation": True}], {}, {"where": "datasets[0].validation"}),
        ([TOY, {**CUP, "validation": True}], {}, {"where": "datasets[1].concept", "given": "<cup>", "expected": ("<toy>",)}),
        ([TOY], {"photos": Path("b")}, {"where": "photos", "given": "b"}),
    ],
)  # fmt: skip
def test_invalid_tables_are_errors(tables: list[dict[str, Any]], settings: dict[str, Any], data: dict[str, Any]) -> None:
    with raises(OptionError, **data):
        dataset_tables(config(*tables, **settings))


@pytest.mark.parametrize(("name", "value"), [("validation_share", 1.0), ("validation_share", -0.1), ("validation_every", 0)])
def test_invalid_values_of_validation_are_errors(name: str, value: float) -> None:
    with raises(OptionError, option=name, given=value):
        config(TOY, **{name: value}).with_defaults()


def test_datasets_are_a_flag_and_a_list_of_tables_in_a_file(tmp_path: Path) -> None:
    cup = "path=cups,concept=<cup>,template=a {concept}, red"
    words = ["personalize", "--datasets", "path=toys,concept=<toy>,class_word=bear", cup]
    found = values(PersonalizeConfig, vars(parser_for(words).parse_args(words)))
    tables = ({**TOY}, {**CUP, "template": "a {concept}, red"})
    assert found["datasets"] == tables
    with_lists = values(
        PersonalizeConfig, vars(parser_for(words).parse_args([*words[:2], "path=a,resolution=[64,128],repeats=2"]))
    )
    assert with_lists["datasets"] == ({"path": "a", "resolution": [64, 128], "repeats": 2},)
    file = tmp_path / "run.toml"
    file.write_text(to_toml("personalize", PersonalizeConfig(**found, options={"lora": {"rank": 2}})))
    read = read_config(["--config", str(file)])
    from veneer import methods

    again = values(PersonalizeConfig, entries_of(read, PersonalizeConfig, {"lora": methods.get("lora")}))
    assert again["datasets"] == tables
    assert read["lora"] == {"rank": 2}, "tables follow the keys"


def test_every_option_of_a_dataset_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
    options = page.partition("## Options of a dataset")[2].partition("## Captions")[0]
    assert [f.name for f in dataclasses.fields(DatasetTable) if f"`{f.name}`" not in options] == []


def test_a_table_without_keys_is_an_error_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser_for(["personalize"]).parse_args(["personalize", "--datasets", "toys"])
    assert "KEY=VALUE" in capsys.readouterr().err
