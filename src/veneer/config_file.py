"""Config files of commands: the options of a command as TOML or YAML.

    veneer personalize --config run.toml --seed 1

Keys are the names of flags, with `_` or `-`; options of a method are in a table of its name. Flags on the command line win.

    photos = "photos/octopus"
    concept = "<octopus>"
    method = "lora"
    learning_rate = 1e-3

    [lora]
    rank = 16
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union

Table = Mapping[str, Any]
CONFIG = "config.toml"
"""Name of the file in the folder of a run."""
UNSAVED = ("out", "resume", "dry_run", "options")
"""Fields that `write_config` leaves out: they are of one run. Options are written as a table for each method."""


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and `--print-config`."""
    group = parser.add_argument_group("config file")
    text = "read options, by the names of their flags, from a .toml or .yaml file; flags win"
    group.add_argument("--config", dest="config file", metavar="FILE", help=text)
    text = "print the options of this command line as a config file, and stop"
    group.add_argument("--print-config", dest="print config", action="store_true", help=text)


def read_config(arguments: Sequence[str]) -> Table:
    """The content of the file after `--config` in a command line, with `_` in names; empty without one.

    Raises:
        OptionError: no such file, another type of file, not a table, or two files.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        names = parser.parse_known_args(list(arguments))[0].config
    except argparse.ArgumentError:  # no value: the command's own parser reports it
        names = []
    if len(names) > 1:
        _fail(f"--config: {len(names)} files; expected one.", "config", given=tuple(names), expected=1)
    return read_table(Path(names[0]).expanduser()) if names else {}


def method_of(content: Table, default: str) -> str:
    """The methods in a config file, by default those of the command.

    Raises:
        OptionError: they are not a string.
    """
    method = content.get("method", default)
    if not isinstance(method, str):
        _fail(
            f"config file: method is {method!r}; expected a string, such as 'ssf+lora'.",
            "method",
            given=method,
            expected="a string",
        )
    return method


def read_table(file: Path) -> Table:
    """The content of a TOML or YAML file, with `_` in its names.

    Raises:
        OptionError: no such file, another type of file, invalid syntax, or not a table.
    """
    parse = {".toml": _parse_toml, ".yaml": _parse_yaml, ".yml": _parse_yaml}.get(file.suffix.lower())
    if parse is None:
        _fail(f"--config {file}: expected a .toml or .yaml file.", file, given=file.suffix, expected=(".toml", ".yaml"))
    try:
        content = parse(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        _fail(f"--config {file}: cannot be read ({error.strerror}).", file, given="unreadable")
    except ValueError as error:
        _fail(f"--config {file}: {error}", file, given="syntax")
    if not isinstance(content, dict):
        _fail(f"--config {file}: expected names and values, got {type(content).__name__}.", file, given=type(content).__name__)
    table = {str(key).replace("-", "_"): value for key, value in content.items()}
    if len(table) < len(content):
        twice = [key for key in map(str, content) if key.replace("-", "_") in content and "-" in key]
        _fail(
            f"--config {file}: {', '.join(twice)} is there with - and with _; expected one of the two.", file, given=tuple(twice)
        )
    return table


def _parse_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _parse_yaml(text: str) -> Any:
    from veneer.extras import require

    require("yaml")
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def entries_of(
    content: Table, config: type, methods: Mapping[str, type] = types.MappingProxyType({}), place: str = ""
) -> dict[str, Any]:
    """The content of a config file as a parsed namespace has it, such as `{"steps": 100, "lora.rank": 16}`.

    Args:
        config: config class of the command. `methods`: classes of the methods in use, whose options are tables.
        place: prefix of the names in errors, for a table inside the file.
    Raises:
        OptionError: an unknown name, or a value of another type.
    """
    hints, entries = _hints(config), dict[str, Any]()
    for key, value in content.items():
        key = f"{key}_" if f"{key}_" in hints else key
        if key in methods and isinstance(value, dict):
            options = _hints(methods[key])
            for name, entry in value.items():
                name = str(name).replace("-", "_")
                _check_known(f"{key}.{name}", name, options)
                entries[f"{key}.{name}"] = _typed(f"{key}.{name}", entry, options[name])
        elif isinstance(value, dict) and key not in hints and methods:
            used = ", ".join(methods)
            _fail(
                f"config file: options of {key}, but the run trains {used}; remove the table.",
                key,
                given=key,
                expected=tuple(methods),
            )
        else:
            _check_known(f"{place}{key}", key, {**hints, **methods})
            entries[key] = _typed(f"{place}{key}", value, hints.get(key, Mapping))
    return entries


def _hints(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.name != "options"}


def _check_known(key: str, name: str, known: Table) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}."
        _fail(f"config file: no option {key!r}; {hint}", key, given=key, expected=tuple(known))


def _typed(key: str, value: Any, hint: Any) -> Any:
    """The value as the annotated type, as `veneer.flags.values` takes it."""
    kinds = list(_alternatives(hint))
    for kind in kinds:
        matched, result = _match(key, value, kind)
        if matched:
            return result
    expected = " or ".join(_name(kind) for kind in kinds)
    quote = " YAML reads no, yes, on and off as true and false: put them in quotes." if isinstance(value, bool) else ""
    _fail(f"config file: {key} is {value!r}; expected {expected}.{quote}", key, given=value, expected=expected)


def _alternatives(hint: Any) -> Iterator[Any]:
    union = typing.get_origin(hint) in (Union, types.UnionType)
    yield from (kind for kind in typing.get_args(hint) if kind is not type(None)) if union else (hint,)


def _match(key: str, value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of a type, and the value converted to it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in args, value
    if origin is tuple:
        several = value if isinstance(value, list) else [value]
        if Ellipsis not in args and len(several) != len(args):
            return False, None
        pairs = [_match(key, each, args[0]) for each in several]
        return all(ok for ok, _ in pairs), [each for _, each in pairs]
    if isinstance(origin or kind, type) and issubclass(origin or kind, Mapping):
        if not isinstance(value, dict) or not args:
            return isinstance(value, dict), value
        entries = {name: _match(key, each, args[1]) for name, each in value.items()}
        return all(ok for ok, _ in entries.values()), {name: each for name, (_, each) in entries.items()}
    if kind is Path:
        return isinstance(value, str), Path(str(value)).expanduser()
    if kind is float:
        number = _number(value) if isinstance(value, str) else value
        return isinstance(number, (int, float)) and not isinstance(number, bool), number
    return type(value) is kind or kind is Any, value


def _number(text: str) -> float | str:
    """The number in a text: YAML reads 1e-3, without a point, as one."""
    try:
        return float(text)
    except ValueError:
        return text


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a list"
    tables: dict[Any, str] = {Mapping[str, int]: "a table of whole numbers", Mapping[str, float]: "a table of numbers"}
    return {**tables, str: "a string", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}.get(
        kind, "a table"
    )


def write_config(path: Path, command: str, config: Any) -> Path:
    """Writes the options of a run as TOML, with which `veneer COMMAND --config PATH` repeats it.

    Args:
        command: such as `personalize`. `config`: its config; options that are None are left out.
    """
    from veneer.atomic_files import write_atomically

    write_atomically(path, to_toml(command, config).encode())
    return path


class ConfigWriter:
    """A callback for each step of a run: writes its config after the first one, then calls `on_step`.

    A start that is rejected, such as a resume with other settings, leaves the file of the earlier run as it is.

    Args:
        path, command, config: as for `write_config`.
    """

    def __init__(self, path: Path, command: str, config: Any, on_step: Callable[[Any], object]) -> None:
        self.path, self.command, self.config, self.on_step, self.is_written = path, command, config, on_step, False

    def __call__(self, progress: Any) -> None:
        if not self.is_written:
            write_config(self.path, self.command, self.config)
            self.is_written = True
        self.on_step(progress)


def to_toml(command: str, config: Any) -> str:
    """The options of a config as TOML."""
    values = {f.name.rstrip("_"): getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in UNSAVED}
    options = {name: each for name, each in getattr(config, "options", {}).items() if each}
    return table_to_toml(command, {**values, **options})


def table_to_toml(command: str, content: Table) -> str:
    """The content of a config file as TOML. Values that are None are left out."""
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment(f"veneer {command} --config FILE"))
    entries = {k: value for k, value in content.items() if value is not None and value != {}}
    for key in sorted(entries, key=lambda key: _is_table(entries[key])):  # stable: tables are last
        document.add(key, tomlkit.item(_plain(entries[key])))
    return tomlkit.dumps(document)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, (tuple, list)) and any(isinstance(each, Mapping) for each in value))


def _plain(value: Any) -> Any:
    """The value in TOML's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value if each is not None]
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    return value if isinstance(value, (str, int, float)) else str(value)


def _fail(message: str, where: Any, **attributes: Any) -> NoReturn:
    """Raises `OptionError`, whose import takes seconds."""
    from veneer.injection.errors import OptionError

    raise OptionError(message, option="config", where=str(where), **attributes)
