"""Config files of the form: reading one into the form, and writing the form as one.

A file comes from a visitor, so that only options which cannot name a path are accepted: fields of the form, the options of
`other_options`, and adapters by their name in the list of the user.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer import methods
from veneer.config_file import CONFIG, entries_of, method_of, read_table, table_to_toml
from veneer.injection import OptionError
from veneer.training.method_names import split_methods
from veneer.training.personalization_config import PersonalizeConfig

from ...jobs import Job
from ...limits import LIMITS
from ...workspace import Workspace, printable
from ..shared.config_form import DEFAULT, Field, text_of, values_of
from .adapter_sources import sources_of
from .concept_groups import groups_of_tables, groups_to_tables
from .other_options import OTHER, read_other, to_text
from .request import SETTINGS, PersonalizeRequest, command, main_method, options_of

FORM = "form.toml"
"""File in the folder of a job with the form that started it."""
SUBJECT = ("concept", "class_word", "base", "method")
SOURCES = ("init_from", "with", "with_", "datasets")
"""Options whose files are named in the form: adapters, and the photos of several concepts."""
ACCEPTED = (*SUBJECT, *(field.name for field in SETTINGS), *OTHER, *SOURCES)
"""Accepted options, besides tables of methods."""


@dataclass(frozen=True)
class LoadedConfig:
    """A config file as a request, with the entries that are left out, each with the reason if it is no option of the form."""

    request: PersonalizeRequest
    left_out: tuple[str, ...]

    def note(self) -> str:
        """What the user has to do next, and what was left out."""
        note = "The form is filled from the file. Add the photos, and press Train."
        names = ", ".join(map(printable, self.left_out))
        return f"{note} Left out, because this app does not accept it from a file: {names}." if names else note


def load_config(workspace: Workspace, path: str | Path) -> LoadedConfig:
    """Reads a config file of `veneer personalize`.

    Raises:
        OptionError: not a TOML or YAML file, an unknown option (with the nearest name), or a wrong value.
        VeneerError: an unknown method or base model, or a value beyond the limits.
    """
    table = _read(Path(path))
    method = method_of(table, "lora")
    names = split_methods(method)
    entries_of(table, PersonalizeConfig, {name: methods.get(name) for name in names})
    main, left_out = main_method(method), [key for key in table if key not in (*ACCEPTED, *names)]
    options = {key.replace("-", "_"): value for key, value in (table.get(main) or {}).items()}
    fields = options_of(method)
    left_out += [f"{main}.{key}" for key in options if key not in {field.name for field in fields}]
    sources, missing = sources_of(workspace, table)
    left_out += [f"adapter {printable(name)}, which you do not have" for name in missing]
    groups, unused = groups_of_tables(table)
    left_out += unused
    concept, word, base = (str(table.get(name) or "") for name in SUBJECT[:3])
    if groups:
        concept, word, groups = groups[0].concept, groups[0].class_word, groups[1:]
    other = {key: value for key, value in table.items() if key in OTHER or key in names[:-1]}
    request = PersonalizeRequest(
        concept, word, base or "bundled", method, _entries(SETTINGS, table), _entries(fields, options), to_text(other), sources,
        tuple(groups),
    )  # fmt: skip
    command(replace(request, concept=concept or "<concept>"), workspace.datasets)  # validates the values
    return LoadedConfig(request, tuple(left_out))


def _read(path: Path) -> Mapping[str, Any]:
    """Content of an uploaded file; errors have its name without its folder.

    Raises:
        OptionError: too large, another type of file, or invalid syntax.
    """
    name, size = printable(path.name), path.stat().st_size
    if size > LIMITS.request_bytes:
        message = f"{name}: {size:,} bytes; expected a config file of at most {LIMITS.request_bytes:,}."
        raise OptionError(message, option="config", file=name, where="request_bytes", given=size, expected=LIMITS.request_bytes)
    try:
        return read_table(path)
    except OptionError as error:
        message = str(error).replace(f"--config {path}", name)
        raise OptionError.from_error(error, message, file=name, where=name) from error


def _entries(fields: Sequence[Field], table: Mapping[str, Any]) -> list[Any]:
    """Value of each field of the form, the default where the table has none."""
    return [_entry(field, table.get(field.name)) for field in fields]


def _entry(field: Field, value: Any) -> Any:
    if field.kind == "check":
        return bool(field.default if value is None else value)
    return text_of(value) or (DEFAULT if field.kind == "choice" else "")


def form_to_toml(request: PersonalizeRequest) -> str:
    """The form as a config file. Photos are left out, and adapters are names in the list of the user.

    Raises:
        VeneerError: a value that the command would reject.
    """
    command(replace(request, concept=request.concept or "<concept>"), Path("photos"))  # validates the values
    main = main_method(request.method)
    subject = {name: value for name in SUBJECT if (value := getattr(request, name))}
    settings = values_of(PersonalizeConfig, SETTINGS, request.settings)
    options = values_of(methods.get(main), options_of(request.method), request.options, main)
    other = read_other(request.other, request.method)
    groups = groups_to_tables(request.concept, request.class_word, request.groups)
    content = {**subject, **settings, **request.sources.table(), **other, **groups, main: options}
    return table_to_toml("personalize", content)


def write_form(job: Job, request: PersonalizeRequest) -> None:
    """Saves the form beside the job that it started, for `config_of_job`."""
    (job.folder / FORM).write_text(form_to_toml(request), encoding="utf-8")


def config_of_job(job: Job) -> str:
    """Config file of a run with all its defaults, without paths of the server; empty before the first step."""
    try:
        table = read_table(job.run / CONFIG)
    except OptionError:  # not written yet
        return ""
    names = split_methods(method_of(table, "lora"))
    accepted = (*ACCEPTED, *names)
    form = read_table(job.folder / FORM) if (job.folder / FORM).exists() else {}
    kept = {key: value for key, value in table.items() if key in accepted and key not in SOURCES}
    return table_to_toml("personalize", {**kept, **{key: value for key, value in form.items() if key in SOURCES}})


def config_download(job: Job) -> list[str]:
    """The config file of a run in a new temporary folder that Gradio may serve; empty before the first step."""
    return [save_download(text)] if (text := config_of_job(job)) else []


def save_download(text: str) -> str:
    """Writes a config file to a new temporary folder that Gradio may serve; returns its path."""
    file = Path(tempfile.mkdtemp(prefix="veneer-")) / CONFIG
    file.write_text(text, encoding="utf-8")
    return file.as_posix()
