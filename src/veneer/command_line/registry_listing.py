"""`veneer methods` and `veneer hosts`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from .output import print_lines

AddFlags = Callable[[argparse.ArgumentParser, Sequence[str]], None]


def registry_command(kind: str) -> AddFlags:
    """The command that lists a registry.

    Args:
        kind: `methods` or `hosts`.
    """

    def add(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        if kind == "methods":
            text = "print the systems of the literature: names here, hosts, what they were compared with, papers"
            parser.add_argument("--survey", action="store_true", default=False, help=text)

        def run(namespace: argparse.Namespace) -> object:
            from veneer.listing import rows, support_matrix, survey

            if getattr(namespace, "survey", False):
                return print_lines(survey().splitlines())
            table = list(rows(kind))
            for name, source, about in table:
                print(f"{name:22}{source:12}{about}")
            if kind == "methods":
                print(f"\nSupported hosts:\n\n{support_matrix()}")
            return {kind: [{"name": name, "source": source, "about": about} for name, source, about in table]}

        parser.set_defaults(run=run)

    return add
