"""The `veneer` command: parser, errors and exit status."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any

from veneer.allocator import keep_freed_memory, share_freed_memory
from veneer.command_line.examples import examples_text
from veneer.command_line.notes import description_of
from veneer.command_line.output import add_output_flags, error_of, output, print_json, result_of
from veneer.command_line.parser import Parser
from veneer.commands import COMMANDS, check_command
from veneer.extras import advice

BROKEN_PIPE = 141
"""Exit status of a program that SIGPIPE terminates: 128 + 13."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0; 1 for an error that is reported in one line; 2 for wrong flags; 130 after an interruption; 141 if
        the reader of the output has closed it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = command_name(arguments)
    try:
        parser = parser_for(arguments)
        command = parser.chosen().prog.removeprefix("veneer ")
        namespace = parser.parse_args(arguments)
        log_to_stderr()
        flags = vars(namespace)
        as_json = bool(flags.get("json output"))
        with output(bool(flags.get("quiet output")), as_json) as printed:
            result = namespace.run(namespace)
        if as_json:
            print_json(command, result_of(result, printed()))
        sys.stdout.flush()
    except _reported_errors() as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            return BROKEN_PIPE
        if "--debug" in arguments or (isinstance(error, ModuleNotFoundError) and not advice(error.name)):
            raise
        print(f"veneer: {_message(error)}", file=sys.stderr)
        if "--json" in arguments:
            print_json(command, error_of(error, _message(error)))
        return 1
    except SystemExit as stop:
        if stop.code == 2 and "--json" in arguments:
            print_json(command, {"error": {"type": "UsageError", "message": Parser.last_error}})
        raise
    except KeyboardInterrupt:
        print("veneer: interrupted", file=sys.stderr)
        return 130
    return 0


def log_to_stderr() -> None:
    """Prints what the library logs, from level INFO on. A library user configures logging instead."""
    import logging

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(self.format(record), file=sys.stderr, flush=True)

    logger = logging.getLogger("veneer")
    if not logger.handlers:
        logger.setLevel(logging.INFO)
        logger.addHandler(Handler())
        logger.propagate = bool(logging.getLogger().handlers)  # a later one would print them again


def _reported_errors() -> tuple[type[Exception], ...]:
    """Errors that are reported without a traceback. veneer's own are included once their module is imported."""
    errors = sys.modules.get("veneer.injection.errors")
    return (ValueError, TypeError, OSError, ModuleNotFoundError, *([errors.VeneerError] if errors else []))


def _message(error: Exception) -> str:
    """The error's message; for an unknown name only the similar names; for a missing library how to install it."""
    if isinstance(error, ModuleNotFoundError):
        return advice(error.name)
    errors = sys.modules.get("veneer.injection.errors")
    if errors and isinstance(error, errors.UnknownName) and error.close:
        return f"no {error.kind} {error.name!r}; did you mean {_join_names(error.close)}?"
    return str(error)


def _join_names(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _output_is_closed() -> bool:
    """True if stdout is a closed pipe. Its buffer is then discarded, so that the exit does not fail on it."""
    try:
        print(flush=True)  # the error may come from another pipe
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def console() -> None:
    """Runs the installed `veneer` command and exits."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    if command_name(sys.argv[1:]) == "app":
        share_freed_memory()
    else:
        keep_freed_memory()
    sys.exit(main())


def complete() -> None:
    """Prints completions for argcomplete, and exits."""
    import argcomplete
    from argcomplete.lexers import split_line

    *_, words, _ = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))
    try:
        parser = parser_for(words[1:])
    except _reported_errors():  # of a config file that is not typed to the end
        parser = parser_for([*itertools.takewhile(lambda word: not word.startswith("--config"), words[1:])])
    argcomplete.autocomplete(parser)


def command_name(arguments: Sequence[str]) -> str:
    """The command's name among the arguments, or ""."""
    return next((word for word in arguments if not word.startswith("-")), "")


class _Version(argparse.Action):
    """Prints the version of the installed package."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"veneer {version('veneer')}")
        parser.exit()


def parser_for(arguments: Sequence[str]) -> Parser:
    """The parser for these arguments, with the flags of the command and the methods that they name."""
    parser = Parser(prog="veneer", description="Parameter-efficient fine-tuning of vision and diffusion models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the installed version")
    parser.set_defaults(run=lambda namespace: parser.print_help())
    commands = parser.add_subparsers(metavar="command")
    check_command(parser, command_name(arguments), COMMANDS)
    for name, (text, add) in COMMANDS.items():
        about: dict[str, Any] = {"help": text, "description": description_of(name, text), "epilog": examples_text(name)}
        command = commands.add_parser(name, argument_default=argparse.SUPPRESS, **about)
        if name == command_name(arguments):
            add(command, arguments)
            if name != "control":  # its subcommands have them
                add_output_flags(command)
    return parser
