"""Fields of the form for config files, adapters to build on, and options without a field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ...context import Context, escape_markup, show_errors
from ...limits import LIMITS
from ...workspace import Workspace
from ..shared.config_form import Slots
from ..shared.events import QUIET
from .adapter_sources import AdapterSources, SourceFields
from .concept_groups import ConceptFields, ConceptGroup
from .config_files import form_to_toml, load_config, save_download
from .form_values import method_summary
from .request import PersonalizeRequest, options_of

Read = Callable[..., PersonalizeRequest]
"""Makes a request of the workspace and the values of the form."""


class MoreFields:
    """Groups of fields below the method options: adapters to build on, other options, and config files.

    Args:
        concepts: fields for further concepts, which are part of the request.
    """

    def __init__(self, concepts: ConceptFields) -> None:
        self.concepts = concepts
        self.sources = SourceFields()
        with gr.Accordion("Config file and other options", open=False):
            self.other = gr.Textbox(
                label="Other options", lines=3, max_lines=12, max_length=LIMITS.config_text, placeholder="warmup = 10",
                elem_id="train-other",
                info="Options of veneer personalize without a field above, one a line, as in a config file.",
            )  # fmt: skip
            self.upload = gr.File(
                label="Fill the form from a file", file_types=[".toml", ".yaml", ".yml"], height=110,
                elem_id="train-config",
            )  # fmt: skip
            self.note = gr.Markdown("", elem_id="train-config-note")
            self.save = gr.Button("Save the form as config.toml", size="sm", elem_id="train-config-save")
            self.file = gr.File(
                label="For veneer personalize --config", file_count="multiple", visible=False, interactive=False,
                elem_id="train-config-file", elem_classes="downloads",
            )  # fmt: skip

    @property
    def components(self) -> list[Any]:
        """Components in the order of `read` and `values`."""
        return [self.other, *self.concepts.components, *self.sources.components]

    def read(self, workspace: Workspace, entries: Sequence[Any]) -> tuple[str, AdapterSources, tuple[ConceptGroup, ...]]:
        """Other options, adapters and further concepts; see `SourceFields.read`."""
        count = 1 + len(self.concepts.components)
        sources = self.sources.read(workspace, entries[count:])
        return str(entries[0] or ""), sources, self.concepts.read(entries[1:count])

    def values(self, workspace: Workspace, request: PersonalizeRequest) -> list[Any]:
        """Values of the components for a request."""
        return [request.other, *self.concepts.values(request.groups), *self.sources.values(workspace, request.sources)]

    def connect(self, context: Context, read_form: Read, form: Sequence[Any], filled: Sequence[Any], slots: Slots) -> None:
        """Connects the events.

        Args:
            read_form: makes a request of the values of `form`.
            filled: components that a config file fills: concept, class word, base model, method, the state of the form, the
                settings, the summary of the method, the slots, and `components`. The preset is the third of `form`.
        """

        def load(request: gr.Request, path: str | None, preset: str) -> list[Any]:
            workspace = context.workspace(request)
            if not path:
                return [gr.skip()] * (len(filled) + 1)
            config = load_config(workspace, path)
            more = self.values(workspace, config.request)
            return [*_form_values(config.request, preset, slots), *more, escape_markup(config.note())]

        def save(request: gr.Request, *values: Any) -> Any:
            text = form_to_toml(read_form(context.workspace(request), *values))
            return gr.File([save_download(text)], visible=True)

        self.sources.connect(context)
        self.upload.upload(show_errors(load), [self.upload, form[2]], [*filled, self.note], **QUIET)
        self.save.click(show_errors(save), [*form], self.file, **QUIET)


def _form_values(request: PersonalizeRequest, preset: str, slots: Slots) -> list[Any]:
    """Values of the fields of the form for a request. The state of the form keeps the preset from overwriting them."""
    fields, about = options_of(request.method), method_summary(request.method)
    filled_for = [preset, request.base, request.method]
    subject = [request.concept, request.class_word, request.base, request.method]
    options = dict(zip((field.name for field in fields), request.options, strict=True))
    return [*subject, filled_for, *request.settings, about, *slots.fill(fields, options)]
