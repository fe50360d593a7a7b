"""The parser of the command line: errors that name what is similar, short usage texts, and examples as they are written."""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from .help_text import HelpFormatter

SHORT_USAGE = 6
"""Largest number of lines of a usage text with flags."""


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated flags, whose errors name the most similar flag or choice.

    A usage text of more than `SHORT_USAGE` lines is replaced by a line without the flags.
    """

    last_error: ClassVar[str] = ""
    """Message of the last error of any parser."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **settings})

    def format_usage(self) -> str:
        usage = super().format_usage()
        if self.usage is None and usage.count("\n") > SHORT_USAGE:
            return f"usage: {self._usage_without_flags()}\n"
        return usage

    def format_help(self) -> str:
        usage, self.usage = self.usage, self.format_usage().removeprefix("usage: ").strip().replace("%", "%%")
        try:
            return super().format_help()
        finally:
            self.usage = usage

    def error(self, message: str) -> NoReturn:
        Parser.last_error = message
        super().error(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self.chosen()
            if unknown[0] in self._option_string_actions:
                parser.error(f"{unknown[0]} belongs before the command: {self.prog} {unknown[0]} …")
            flags = list(parser._option_string_actions)
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{_similar(unknown[0].partition('=')[0], flags)}")
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        missing = self._missing_positional(words)
        if missing is not None and (places := self._last_values(words)):
            place, name = places[-1], missing.dest
            if Path(words[place]).exists():
                flag = next(word for word in reversed(words[:place]) if word.startswith("-"))
                self.error(f"{flag} took {words[place]!r}, and {name} is missing; write {name} before the flags")
            if missing.required and name == "prompt" and not _is_adapter(words[place]):  # generate --adapter A 'a prompt'
                words = [words[place], *words[:place], *words[place + 1 :]]
        return super().parse_known_args(words, namespace)

    def _missing_positional(self, words: Sequence[str]) -> argparse.Action | None:
        """The first positional argument, if no word is one."""
        several: float = 0  # values that the flag before still takes
        for word in words:
            if word == "--":
                return None
            if word.startswith("-"):
                nargs = getattr(self._option_string_actions.get(word), "nargs", 0)
                several = nargs if isinstance(nargs, int) else 1 if nargs in (None, "?") else math.inf
            elif several > 0:
                several -= 1
            else:
                return None
        return next((action for action in self._actions if not action.option_strings), None)

    def _last_values(self, words: Sequence[str]) -> list[int]:
        """Places of the last values of flags that take any number of values and have at least two."""
        starts = [place for place, word in enumerate(words) if word.startswith("-")]
        spans = [(start, end) for start, end in itertools.pairwise([*starts, len(words)]) if end - start > 2]
        return [end - 1 for start, end in spans if getattr(self._option_string_actions.get(words[start]), "nargs", None) == "+"]

    def _usage_without_flags(self) -> str:
        shown = [action for action in self._actions if not action.option_strings]
        words = [f"[{a.dest}]" if a.nargs in ("?", "*") else a.dest for a in shown]
        return " ".join([self.prog, *words, "[flags]"])

    def chosen(self) -> Parser:
        """The parser of the command on the command line: the only one below this that has flags."""
        inner = [p for a in self._actions if isinstance(a, argparse._SubParsersAction) for p in a.choices.values()]
        return next((p.chosen() for p in inner if len(p._actions) > 1), self)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _similar(str(value), [str(choice) for choice in action.choices or ()])
            raise


def _is_adapter(word: str) -> bool:
    """True if a word has the form `USER/REPO` or `NAME:STRENGTH`, so that it is no prompt."""
    return " " not in word and ("/" in word or re.search(r":\d*\.?\d+$", word) is not None)


def _similar(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""
