"""Checks and their outcomes."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch

Outcome = Literal["passed", "failed", "expected", "skipped"]


class Skip(unittest.SkipTest):
    """Raised by a check that does not apply, with the reason. pytest reports it as skipped."""


@dataclass(frozen=True)
class Record:
    """The outcome of one check.

    Args:
        check: its name. `method` is empty for checks of a host.
        outcome: `expected` is an expected failure; an expected failure that passes is `failed`.
        reason: why it was skipped or expected. `error`: the raised exception.
    """

    check: str
    method: str
    host: str
    model: str
    outcome: Outcome
    reason: str = ""
    error: Exception | None = field(default=None, compare=False)

    def __str__(self) -> str:
        subject = "-".join(filter(None, (self.method, self.host, self.model, self.check)))
        why = self.reason or (f"{type(self.error).__name__}: {self.error}" if self.error else "")
        return f"{self.outcome:8} {subject}{': ' if why else ''}{why}"


class Records(tuple[Record, ...]):
    """The outcomes of a subject's checks, in order; prints as one line each."""

    @property
    def failures(self) -> tuple[Record, ...]:
        """Failed checks, including expected failures that passed."""
        return tuple(r for r in self if r.outcome == "failed")

    def __str__(self) -> str:
        return "\n".join(map(str, self))


@dataclass(frozen=True)
class Check:
    """One check of one model.

    Args:
        name: of the check. `method`, `host`, `model`: its subject; `method` is empty for checks of a host.
        body: raises on failure, and `Skip` if the check does not apply.
    """

    name: str
    method: str
    host: str
    model: str
    body: Callable[[], None] = field(repr=False)

    @property
    def id(self) -> str:
        """`lora-timm_vit-vit-detach`, or `timm_vit-vit-ports` for a host."""
        return "-".join(filter(None, (self.method, self.host, self.model, self.name)))

    def __call__(self) -> None:
        """Runs with a fixed seed and restores the global random state."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body()

    def record(self, expected: Mapping[str, str]) -> Record:
        """Runs the check and returns its outcome. `expected` maps names of checks or patterns of ids to reasons."""
        reason = self.expected(expected)
        try:
            self()
        except Skip as skip:
            return self._record("skipped", str(skip))
        except Exception as error:
            return self._record("expected" if reason else "failed", reason, error)
        if reason:
            return self._record("failed", f"passed, but a failure was expected: {reason}")
        return self._record("passed")

    def expected(self, expected: Mapping[str, str]) -> str:
        """The reason why this check is expected to fail, or an empty string."""
        return next((why for pattern, why in expected.items() if pattern == self.name or fnmatchcase(self.id, pattern)), "")

    def _record(self, outcome: Outcome, reason: str = "", error: Exception | None = None) -> Record:
        return Record(self.name, self.method, self.host, self.model, outcome, reason, error)
