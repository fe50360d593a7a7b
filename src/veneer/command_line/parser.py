"""The parser of the command line: errors that name what is similar, short usage texts, and examples as they are written."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

SHORT_USAGE = 6
"""Largest number of lines of a usage text with flags."""


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated flags, whose errors name the most similar flag or choice.

    A usage text of more than `SHORT_USAGE` lines is replaced by a line without the flags.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": layout, **settings})

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
        super().error(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = self._chosen()
            flags = [*self._option_string_actions, *parser._option_string_actions]
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{_similar(unknown[0].partition('=')[0], flags)}")
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        missing = self._missing_positional(words)
        flag, word = self._last_value(words)
        if missing and flag and Path(word).exists():
            self.error(f"{flag} took {word!r}, and {missing.dest} is missing; write {missing.dest} before the flags")
        if missing and flag and missing.required:
            words = [word, *words[:-1]]  # veneer generate --adapter A 'a prompt'
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

    def _last_value(self, words: Sequence[str]) -> tuple[str, str]:
        """The last flag and the last word, if the flag takes any number of values and has at least two; else empty strings."""
        place = max((place for place, word in enumerate(words) if word in self._option_string_actions), default=len(words))
        if len(words) - place < 3 or self._option_string_actions[words[place]].nargs != "+":
            return "", ""
        return words[place], words[-1]

    def _usage_without_flags(self) -> str:
        shown = [action for action in self._actions if not action.option_strings]
        words = [f"[{a.dest}]" if a.nargs in ("?", "*") else a.dest for a in shown]
        return " ".join([self.prog, *words, "[flags]"])

    def _chosen(self) -> Parser:
        """The parser of the command on the command line: the only one below this that has flags."""
        inner = [p for a in self._actions if isinstance(a, argparse._SubParsersAction) for p in a.choices.values()]
        return next((p._chosen() for p in inner if len(p._actions) > 1), self)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _similar(str(value), [str(choice) for choice in action.choices or ()])
            raise


def _similar(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""
