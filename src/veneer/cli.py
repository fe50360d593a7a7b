"""The command line: one command a pipeline, its flags read off the pipeline's config class."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from veneer.allocator import keep_freed_memory, share_freed_memory
from veneer.discovery import find_entries
from veneer.extras import advice
from veneer.flags import add_flags, values
from veneer.static_source import class_named, class_of
from veneer.training.method_names import split_methods

BROKEN_PIPE = 141
"""Exit status of a program that SIGPIPE ends: 128 + 13."""

SHORT_USAGE = 15
"""Most lines of a usage that is shown before an error."""

Run = Callable[[argparse.Namespace], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 1 for an error that is explained in one line; 2 for wrong flags; 130 after an interruption; 141 if
        whoever reads the output has closed it.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        found = parser_for(given).parse_args(given)
        found.run(found)
        sys.stdout.flush()
    except _explained() as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            return BROKEN_PIPE
        if "--debug" in given:
            raise
        print(f"veneer: {_told(error)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if "--debug" in given or not advice(error.name):
            raise
        print(f"veneer: {advice(error.name)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("veneer: interrupted", file=sys.stderr)
        return 130
    return 0


def _explained() -> tuple[type[Exception], ...]:
    """Errors whose message is enough. veneer's own are among them once they are imported; before, none can be raised."""
    errors = sys.modules.get("veneer.injection.errors")
    return (ValueError, TypeError, OSError, *([errors.VeneerError] if errors else []))


def _told(error: Exception) -> str:
    """The error's sentence; the nearest names, not all of them, if a name is misspelled."""
    errors = sys.modules.get("veneer.injection.errors")
    if errors and isinstance(error, errors.UnknownName) and error.close:
        return f"no {error.kind} {error.name!r}; did you mean {_listed(error.close)}?"
    return str(error)


def _listed(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _output_is_closed() -> bool:
    """True if stdout is a closed pipe; what is left in its buffer is then discarded, so that exiting does not fail on it."""
    try:
        print(flush=True)  # another pipe may have broken
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def console() -> None:
    """The installed `veneer` command, in a process of its own."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    if _command(sys.argv[1:]) == "app":
        share_freed_memory()
    else:
        keep_freed_memory()
    sys.exit(main())


def complete() -> None:
    """Answer a shell that completes a command line by argcomplete, and exit."""
    import argcomplete

    *_, words, _ = argcomplete.split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))
    argcomplete.autocomplete(parser_for(words[1:]))


def _command(given: Sequence[str]) -> str:
    """The command's name among its words; nothing if there is none."""
    return next((word for word in given if not word.startswith("-")), "")


class Parser(argparse.ArgumentParser):
    """A parser that shows its usage before an error only if it is short; the usage of `personalize` has 47 lines."""

    def error(self, message: str) -> NoReturn:
        usage = self.format_usage()
        if usage.count("\n") <= SHORT_USAGE:
            super().error(message)
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Prints the version in the metadata of the installed package."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"veneer {version('veneer')}")
        parser.exit()


def parser_for(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these words: flags are read off the command and the methods that they name."""
    parser = Parser(prog="veneer", description="Thin trained layers on frozen vision and diffusion models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the installed version")
    parser.set_defaults(run=lambda found: parser.print_help())
    commands = parser.add_subparsers(metavar="command")
    _check_command(parser, _command(given), COMMANDS)
    for name, (text, add) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        if name == _command(given):
            add(command, given)
    return parser


def _check_command(parser: argparse.ArgumentParser, name: str, known: Mapping[str, object]) -> None:
    """Reject an unknown command, with the nearest one."""
    if name and name not in known:
        close = difflib.get_close_matches(name, known, 1)
        parser.error(f"no command {name!r}{f'; did you mean {close[0]!r}?' if close else ''}")


def _training(function: str, config_name: str, positional: str) -> Any:
    """A command that trains methods, which have flags of their own."""

    def add(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
        module = f"veneer.pipelines.{function}"
        described = class_of(module, config_name)
        names = _methods(given, described.method)
        taken = add_flags(parser, described, positional=(positional,), skip=("options",))
        for name in names:
            group = parser.add_argument_group(f"options of {name}")
            taken |= add_flags(group, _described(name), skip=("by_site",), prefix=name, taken=taken)

        def run(found: argparse.Namespace) -> object:
            pipeline = importlib.import_module(module)
            from veneer import methods

            config, flags = getattr(pipeline, config_name), vars(found)
            options = {name: values(methods.get(name), flags, name) for name in names}
            return getattr(pipeline, function)(config(**values(config, flags), options={n: o for n, o in options.items() if o}))

        parser.set_defaults(run=run)

    return add


def _methods(given: Sequence[str], usual: str) -> list[str]:
    """The methods named by `--method`."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    look.add_argument("--method", default=usual)
    try:
        named = look.parse_known_args(given)[0].method
    except argparse.ArgumentError:  # without a value: the command's own parser says so
        named = usual
    return [] if named == "zero_shot" else split_methods(named)


def _described(method: str) -> Any:
    """The class of a method, or what `class_of` gives for it."""
    entry = next((entry for entry in find_entries("veneer.methods", "veneer.methods") if entry.name == method), None)
    found = class_named(entry) if entry else None
    if found is None:
        from veneer import methods

        return methods.get(method)
    return found


def _plain(module: str, function: str, config: str, positional: Sequence[str] = (), show: bool = False) -> Any:
    """A command that is a function on its config, mostly a pipeline's."""

    def add(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
        path = f"veneer.{module}" if "." in module else f"veneer.pipelines.{module}"
        add_flags(parser, class_of(path, config), positional=positional)

        def run(found: argparse.Namespace) -> None:
            pipeline = importlib.import_module(path)
            kind = getattr(pipeline, config)
            result = getattr(pipeline, function)(kind(**values(kind, vars(found))))
            for line in result if show else ():
                print(line)

        parser.set_defaults(run=run)

    return add


def _several(**commands: tuple[str, Any]) -> Any:
    """A command that is followed by another: its name, what it says, and what adds its flags."""

    def add(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
        words = parser.add_subparsers(metavar="command", required=True)
        asked = [word for word in given if not word.startswith("-")][1:2]
        _check_command(parser, "".join(asked), commands)
        for name, (text, add_flags_of) in commands.items():
            command = words.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
            if [name] == asked:
                add_flags_of(command, given)

    return add


def _sites(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    parser.add_argument(
        "base",
        help="`bundled`, `bundled_clip`, a diffusers folder, a hub name, or a timm or open_clip model as `--model` takes it",
    )

    def run(found: argparse.Namespace) -> None:
        from veneer import base_models
        from veneer.classification.models.loading import untrained
        from veneer.injection import sites

        print(sites(untrained(found.base) or base_models.load(found.base)))

    parser.set_defaults(run=run)


def _table(what: str) -> Any:
    def add(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
        def run(found: argparse.Namespace) -> None:
            from veneer.listing import rows, support_matrix

            for name, source, about in rows(what):
                print(f"{name:22}{source:12}{about}")
            if what == "methods":
                print(f"\nWhat fits what, by needs and offers:\n\n{support_matrix()}")

        parser.set_defaults(run=run)

    return add


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser, Sequence[str]], None]]] = {
    "personalize": (
        "teach a diffusion base a subject or style from a few photos",
        _training("personalize", "PersonalizeConfig", "photos"),
    ),
    "transfer": (
        "teach a timm or open_clip model to tell classes of pictures apart",
        _training("transfer", "TransferConfig", "data"),
    ),
    "compare": ("compare methods on a dataset, over several seeds", _plain("compare", "compare", "CompareConfig", ("data",))),
    "predict": (
        "ask a taught classifier about pictures",
        _plain("predict", "predict", "PredictConfig", ("folder", "images"), True),
    ),
    "control": (
        "teach a diffusion base to follow maps or pictures, and draw with what was learnt",
        _several(
            train=("learn to follow maps or pictures", _training("control", "ControlConfig", "data")),
            generate=("draw under maps or pictures", _plain("control", "draw", "DrawConfig", ("prompt",), True)),
        ),
    ),
    "generate": ("draw pictures with trained adapters", _plain("generate", "generate", "GenerateConfig", ("prompt",), True)),
    "inspect": ("what is in an adapter's file", _plain("inspect_file", "inspect_file", "InspectConfig", ("file",), True)),
    "convert": ("an adapter's file in another format", _plain("convert", "convert", "ConvertConfig", ("file",), True)),
    "merge": ("several adapters' files as one LoRA", _plain("merge", "merge", "MergeConfig", ("files",), True)),
    "extract": ("a LoRA out of a fine-tuned model", _plain("extract", "extract", "ExtractConfig", ("tuned",), True)),
    "resize": ("an adapter's file as a LoRA of another rank", _plain("resize", "resize", "ResizeConfig", ("file",), True)),
    "sites": ("what can be adapted in a base", _sites),
    "methods": ("the methods there are", _table("methods")),
    "hosts": ("the model families there are", _table("hosts")),
    "examples": ("write example images to a folder", _plain("examples", "examples", "ExamplesConfig", ("folder",), True)),
    "app": ("open the app in the browser", _plain("apps.server", "app", "AppConfig")),
    "bench": ("time veneer against the frozen base and peft", _plain("bench", "bench", "BenchConfig")),
    "pretrain-base": ("train the bundled bases from scratch", _plain("pretrain_base", "pretrain_base", "PretrainConfig")),
}
