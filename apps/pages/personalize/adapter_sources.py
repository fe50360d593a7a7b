"""Adapters that a run starts from (`--init-from`) or trains on top of (`--with`), chosen from those of the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from veneer.training.fixed_adapters import split_strength

from ...context import Context, show_errors
from ...workspace import Workspace
from ..shared.adapter_lists import refresh_on_change
from ..shared.events import QUIET
from ..shared.generation_request import MAX_STRENGTH, select_adapters

MAX_FIXED = 4
"""Adapters that a run can train on top of."""
NONE = ""
"""Choice of no initial adapter."""


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter of the user: its name in the list, its file, and its strength."""

    name: str
    file: Path
    strength: float = 1.0


@dataclass(frozen=True)
class AdapterSources:
    """Adapters of a training request: `initial` to start from, and `fixed` ones below the new adapter."""

    initial: NamedAdapter | None = None
    fixed: tuple[NamedAdapter, ...] = ()

    def flags(self) -> list[str]:
        """Command-line flags."""
        flags = [f"--init-from={self.initial.file}"] if self.initial else []
        files = [f"{each.file}:{each.strength:g}" for each in self.fixed]
        return [*flags, *(["--with", *files] if files else [])]

    def table(self) -> dict[str, Any]:
        """Entries of a config file, with names instead of files."""
        entries: dict[str, Any] = {"init_from": self.initial.name} if self.initial else {}
        names = [f"{each.name}:{each.strength:g}" for each in self.fixed]
        return {**entries, "with": names} if names else entries


def select_sources(workspace: Workspace, initial: Any, names: Sequence[str] | None, strengths: Sequence[Any]) -> AdapterSources:
    """Adapters of the user by name.

    Raises:
        VeneerError: too many, duplicate or unknown adapters, or a strength beyond ±2.
    """
    first = NamedAdapter(str(initial), workspace.adapter(str(initial))) if initial else None
    uses = select_adapters(workspace, list(names or ()), strengths, MAX_FIXED)
    return AdapterSources(first, tuple(NamedAdapter(name, use.file, use.strength) for name, use in uses.items()))


def sources_of(workspace: Workspace, table: Mapping[str, Any]) -> tuple[AdapterSources, list[str]]:
    """Adapters of a config file, and the entries that are not among those of the user.

    Raises:
        VeneerError: too many or duplicate adapters, or a strength beyond ±2.
    """
    known = workspace.all_adapters()
    initial, texts = str(table.get("init_from") or NONE), table.get("with") or table.get("with_") or []
    pairs = [(text, 1.0) if text in known else split_strength(text) for text in ([texts] if isinstance(texts, str) else texts)]
    missing = [name for name in (*([initial] if initial else []), *(name for name, _ in pairs)) if name not in known]
    pairs = [pair for pair in pairs if pair[0] in known]
    names, strengths = [name for name, _ in pairs], [strength for _, strength in pairs]
    return select_sources(workspace, initial if initial in known else NONE, names, strengths), missing


class SourceFields:
    """Fields for the adapters of a run, in a closed accordion."""

    def __init__(self) -> None:
        with gr.Accordion("Start from or train on top of adapters", open=False):
            self.initial = gr.Dropdown(
                [("none", NONE)], value=NONE, label="Start from", elem_id="train-init-from",
                info="Training continues from its weights; it needs the method and sites of this run.",
            )  # fmt: skip
            self.fixed = gr.Dropdown(
                [], value=[], multiselect=True, max_choices=MAX_FIXED, label="Train on top of", elem_id="train-with",
                info="They are attached first and stay fixed, and are needed again to generate.",
            )  # fmt: skip
            self.strengths = [
                gr.Slider(-MAX_STRENGTH, MAX_STRENGTH, value=1.0, step=0.05, label=f"Strength {i + 1}", visible=False)
                for i in range(MAX_FIXED)
            ]

    @property
    def components(self) -> list[Any]:
        """Components in the order of `read` and `values`."""
        return [self.initial, self.fixed, *self.strengths]

    @staticmethod
    def read(workspace: Workspace, entries: Sequence[Any]) -> AdapterSources:
        """Adapters for the values of the components; see `select_sources`."""
        initial, names, *strengths = entries
        return select_sources(workspace, initial, names, strengths)

    @staticmethod
    def values(workspace: Workspace, sources: AdapterSources) -> list[Any]:
        """Values of the components."""
        names = list(workspace.all_adapters())
        fixed = [each.name for each in sources.fixed]
        initial = sources.initial.name if sources.initial else NONE
        sliders = strength_sliders(fixed, [each.strength for each in sources.fixed])
        return [_initial(names, value=initial), gr.Dropdown(choices=names, value=fixed, multiselect=True), *sliders]

    def connect(self, context: Context) -> None:
        """Updates the lists when the user's adapters change, and shows a slider for each chosen adapter."""

        def lists(workspace: Workspace, _: Any) -> list[Any]:
            names = list(workspace.all_adapters())
            return [_initial(names), gr.Dropdown(choices=names)]

        refresh_on_change(context, [self.initial, self.fixed], lists, self.initial)
        self.fixed.input(show_errors(strength_sliders), [self.fixed], self.strengths, **QUIET)


def _initial(names: Sequence[str], **more: Any) -> Any:
    return gr.Dropdown(choices=[("none", NONE), *((name, name) for name in names)], **more)


def strength_sliders(names: Sequence[str] | None, strengths: Sequence[float] | None = None) -> list[Any]:
    """A labeled strength slider for each name. Without `strengths`, their values stay."""
    names = list(names or [])[:MAX_FIXED]
    values: list[dict[str, Any]] = [{"value": strength} for strength in strengths or ()] or [{}] * len(names)
    shown = [gr.Slider(visible=True, label=f"Strength of {n}", **v) for n, v in zip(names, values, strict=True)]
    return [*shown, *[gr.Slider(visible=False)] * (MAX_FIXED - len(shown))]
