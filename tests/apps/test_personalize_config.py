"""Config files on the page Train: the form as a file, a file in the form, and adapters that a run builds on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from veneer.apps.components import AppBlocks
from veneer.apps.context import Context
from veneer.apps.jobs import Job, create_job
from veneer.apps.limits import LIMITS
from veneer.apps.pages.personalize import personalize_page
from veneer.apps.pages.personalize.adapter_sources import MAX_FIXED, select_sources, sources_of
from veneer.apps.pages.personalize.config_files import (
    ACCEPTED,
    FORM,
    LoadedConfig,
    config_of_job,
    form_to_toml,
    load_config,
    write_form,
)
from veneer.apps.pages.personalize.other_options import OTHER, other_flags
from veneer.apps.pages.personalize.request import SETTINGS, PersonalizeRequest, command, options_of
from veneer.apps.workspace import Workspace

from tests.raising import raises
from veneer.cli import parser_for
from veneer.config_file import CONFIG, read_table, write_config
from veneer.injection import OptionError, UnknownName, VeneerError
from veneer.training.personalization_config import PersonalizeConfig

PATHS = ("photos", "out", "cache_folder", "validation", "features", "tracker", "resume", "check", "shard_base")
"""Options that may name a path of the server, or that belong to the command line."""


def request(method: str = "lora", other: str = "", sources: Any = None, options: Any = (), **given: Any) -> PersonalizeRequest:
    """A form with all its defaults, except for some settings and options."""

    def default(field: Any) -> Any:
        return field.default if field.kind == "check" else "default" if field.kind == "choice" else ""

    settings = [given.get(field.name, default(field)) for field in SETTINGS]
    values = [dict(options).get(field.name, default(field)) for field in options_of(method)]
    more = {} if sources is None else {"sources": sources}
    return PersonalizeRequest("<toy>", "toy", "bundled", method, settings, values, other, **more)


def adapter(workspace: Workspace, name: str) -> Path:
    workspace.adapters.mkdir(parents=True, exist_ok=True)
    (workspace.adapters / f"{name}.safetensors").write_bytes(b"")
    return workspace.adapters / f"{name}.safetensors"


def load(workspace: Workspace, folder: Path, text: str, name: str = "run.toml") -> LoadedConfig:
    (folder / name).write_text(text)
    return load_config(workspace, folder / name)


LORA = {"rank": "4", "by_site": "mlp.*:rank=2,alpha=3 conv:rslora=true", "rslora": True, "init": "gaussian", "alpha": "-1.5"}
OTHERS = 'warmup = 10\nprompts = ["a <toy>, red", "a {concept} on grass"]\nshuffle_tags = true\nmasks = false'
FORMS = {
    "defaults": request(),
    "settings": request(
        steps="20",
        where="attn xattn",
        learning_rate="0.001",
        buckets=False,
        quantize="nf4",
        crop="random",
        offload_encoders=False,
    ),
    "options": request(options=LORA),
    "other options": request(other=OTHERS, steps="7"),
    "several methods": request("pivotal", other="[textual_inversion]\nvectors = 2", options={"rank": "8"}),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_form_survives_its_config_file(form: PersonalizeRequest, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    loaded = load(workspace, tmp_path, form_to_toml(form))
    assert loaded.left_out == ()
    assert (loaded.request.concept, loaded.request.class_word) == (form.concept, form.class_word)
    assert list(loaded.request.settings) == list(form.settings)
    assert list(loaded.request.options) == list(form.options)
    assert command(loaded.request, tmp_path) == command(form, tmp_path)


def test_config_file_is_one_of_the_command_line(tmp_path: Path) -> None:
    """The command reads the values of the form from the file."""
    form = request(steps="20", where="attn xattn", other=OTHERS, options=LORA)
    (tmp_path / "run.toml").write_text(form_to_toml(form))
    words = ["personalize", "photos", "--config", str(tmp_path / "run.toml")]
    parser_for(words).parse_args(words)  # an unknown option would stop it
    table = read_table(tmp_path / "run.toml")
    assert (table["steps"], table["where"], table["warmup"], table["masks"]) == (20, ["attn", "xattn"], 10, False)
    assert table["prompts"] == ["a <toy>, red", "a {concept} on grass"]
    assert table["lora"]["by_site"] == {"mlp.*": {"rank": 2, "alpha": 3}, "conv": {"rslora": True}}


def test_adapters_are_named_in_a_config_file(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first, second = adapter(workspace, "fish"), adapter(workspace, "oil 12:30")
    form = request(sources=select_sources(workspace, "fish", ["oil 12:30", "fish"], [0.7, 1]))
    words = command(form, tmp_path)
    assert f"--init-from={first}" in words
    assert words[words.index("--with") + 1 :][:2] == [f"{second}:0.7", f"{first}:1"]
    text = form_to_toml(form)
    assert str(workspace.folder) not in text
    loaded = load(workspace, tmp_path, text)
    assert loaded.request.sources == form.sources
    assert sources_of(workspace, {"with": "oil 12:30"})[0].fixed[0].strength == 1, "a colon in a name is no strength"


def test_adapters_of_a_config_file_are_those_of_the_user(tmp_path: Path) -> None:
    """Neither a path nor an adapter of another user is read."""
    workspace, other = Workspace(tmp_path, "ann"), Workspace(tmp_path, "bob")
    path = adapter(other, "secret")
    loaded = load(workspace, tmp_path, f'init_from = "{path}"\nwith = ["secret:0.5", "{path}:0.5"]')
    assert len(loaded.left_out) == 3
    assert not any(str(path) in word for word in command(request(sources=loaded.request.sources), tmp_path))
    with raises(UnknownName, name="secret", kind="adapter"):
        select_sources(workspace, "secret", [], [])
    with raises(OptionError, option="adapters", expected=MAX_FIXED):
        select_sources(other, None, ["secret"] * (MAX_FIXED + 1), [1] * (MAX_FIXED + 1))


@pytest.mark.parametrize(
    ("text", "error", "data"),
    [
        ("stepz = 3", OptionError, {"option": "config", "given": "stepz", "where": "stepz"}),
        ("steps = 'many'", OptionError, {"option": "config", "given": "many", "where": "steps"}),
        ("[lora]\nrankk = 3", OptionError, {"option": "config", "given": "lora.rankk"}),
        ("[dora]\nrank = 3", OptionError, {"option": "config", "given": "dora", "expected": ("lora",)}),
        ("method = 'loraa'", UnknownName, {"name": "loraa"}),
        ("batch = 65", OptionError, {"option": "batch", "given": 65, "expected": LIMITS.photos}),
        ("preview_steps = 101", OptionError, {"option": "preview_steps", "given": 101, "expected": LIMITS.steps}),
        ("quantize = '/etc/x.gguf'", OptionError, {"option": "quantize", "given": "/etc/x.gguf"}),
        ("steps = ", OptionError, {"option": "config", "given": "syntax"}),
    ],
)
def test_invalid_config_files_are_rejected(text: str, error: type[VeneerError], data: dict[str, Any], tmp_path: Path) -> None:
    with raises(error, **data) as caught:
        load(Workspace(tmp_path), tmp_path, text)
    assert str(tmp_path) not in str(caught.value), "no folder of the server"
    if data.get("given") == "stepz":
        assert "steps" in caught.value.expected


def test_config_files_are_toml_or_yaml(tmp_path: Path) -> None:
    assert load(Workspace(tmp_path), tmp_path, "steps: 3", "a.yml").request.settings[0] == "3"
    with raises(OptionError, given=".txt", file="a.txt"):
        load(Workspace(tmp_path), tmp_path, "steps = 3", "a.txt")
    with raises(OptionError, where="request_bytes", expected=LIMITS.request_bytes):
        load(Workspace(tmp_path), tmp_path, "#" * (LIMITS.request_bytes + 1))


def test_paths_of_a_config_file_are_left_out(tmp_path: Path) -> None:
    text = "\n".join(f'{name} = "/srv/secret"' for name in ("photos", "out", "cache_folder", "validation", "features"))
    loaded = load(Workspace(tmp_path), tmp_path, f'{text}\nsteps = 3\n[[datasets]]\npath = "/srv/secret"')
    assert set(loaded.left_out) == {"photos", "out", "cache_folder", "validation", "features", "datasets[0].path"}
    assert not any("/srv" in word for word in command(request(steps="3"), tmp_path))
    assert not any("/srv" in word for word in command(loaded_with_concept(loaded), tmp_path))
    assert not {*PATHS} & {*ACCEPTED}
    assert {*OTHER} <= set(PersonalizeConfig.__dataclass_fields__)


def loaded_with_concept(loaded: LoadedConfig) -> PersonalizeRequest:
    request = loaded.request
    return PersonalizeRequest("<toy>", "", request.base, request.method, request.settings, request.options, request.other)


@pytest.mark.parametrize("text", ['cache_folder = "/srv"', 'photos = "/srv"', "steps = 3", "[lora]\nrank = 3"])
def test_other_options_have_no_paths_and_no_fields(text: str) -> None:
    with raises(OptionError, option="other"):
        other_flags(text, "lora")


@pytest.mark.parametrize(("text", "name"), [('prompts = ["a <toy>", "--out=/etc"]', "prompts"), ("warmup = 1.5", "config")])
def test_other_options_are_checked(text: str, name: str) -> None:
    with raises(OptionError, option=name):
        other_flags(text, "lora")


def test_config_of_a_run_names_no_folder(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    sources = select_sources(workspace, None, [adapter(workspace, "fish").stem], [0.5])
    job: Job = create_job(workspace.jobs, "train", "a toy", [])
    assert config_of_job(job) == ""
    write_form(job, request(sources=sources))
    job.run.mkdir()
    config = PersonalizeConfig(
        photos=workspace.datasets / "x", concept="<toy>", out=job.run, with_=(str(sources.fixed[0].file),), features="bundled",
        cache_folder=tmp_path / "cache", warmup=7, options={"lora": {"rank": 3}},
    )  # fmt: skip
    write_config(job.run / CONFIG, "personalize", config)
    text = config_of_job(job)
    assert str(tmp_path) not in text
    loaded = load(workspace, tmp_path, text)
    assert loaded.left_out == ()
    assert loaded.request.sources == sources
    assert "--warmup=7" in command(loaded.request, tmp_path)
    assert "--lora.rank=3" in command(loaded.request, tmp_path)
    (job.folder / FORM).unlink()
    assert str(tmp_path) not in config_of_job(job), "a job without its form"


def test_started_job_keeps_its_form(tmp_path: Path) -> None:
    context = Context.create(tmp_path / "app")
    workspace = context.workspace(None)
    paths: Sequence[str] = personalize_page.show_example("bundled")[0]
    job = personalize_page.start_job(context, workspace, paths, [], request(steps="7"))
    assert read_table(job.folder / FORM)["steps"] == 7


def test_config_file_fills_the_page(tmp_path: Path) -> None:
    """The following change of the method does not overwrite what the file has."""
    form = request("glora", other="warmup = 3", steps="7", quantize="nf4", options={"rank": "5"})
    (tmp_path / "run.toml").write_text(form_to_toml(form))
    with AppBlocks() as page:
        personalize_page.build(Context.create(tmp_path / "app"))
    events = [event for event in page.fns.values() if event.fn]
    load_event = next(e for e in events if any(getattr(o, "elem_id", "") == "train-config-note" for o in e.outputs))
    values: list[Any] = load_event.fn(None, str(tmp_path / "run.toml"), "balanced")  # type: ignore[misc]
    assert len(values) == len(load_event.outputs)
    shown = {getattr(part, "elem_id", None): value for part, value in zip(load_event.outputs, values, strict=True)}
    ids = ("train-concept", "train-word", "train-method", "train-steps", "train-quantize", "train-other")
    assert [shown[each] for each in ids] == ["<toy>", "toy", "glora", "7", "nf4", "warmup = 3"]
    assert any(getattr(value, "label", "") == "rank" and value.value == "5" for value in values)
    fill = next(event.fn for event in events if event.fn and getattr(event.fn, "__name__", "") == "fill")
    state = next(value for part, value in zip(load_event.outputs, values, strict=True) if isinstance(part, gr.State))
    assert all(value == gr.skip() for value in fill("balanced", "bundled", "glora", state))
    assert fill("quick", "bundled", "glora", state)[0] == ["quick", "bundled", "glora"]
