"""Parts of a page that are updated when what they show has changed, with one timer for all of them.

changed = watch("adapters", names_of_adapters)      # inside the page
changed.change(update, inputs, outputs)

Every event of Gradio takes tens of milliseconds in the browser and on the server: a timer for each part would take half a core
for every open page, even where nothing happens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr
from gradio.context import Context as BlocksContext

from .context import show_errors

INTERVAL = 2.0
"""Seconds between checks for changes."""


class _Watched(NamedTuple):
    stamp: Callable[..., Any]
    inputs: Sequence[Any]
    changed: gr.Textbox


class WatchingBlocks(gr.Blocks):
    """Blocks with a timer that computes the stamps of all watched parts."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.watched: dict[str, _Watched] = {}
        super().__init__(*args, **named)

    def __exit__(self, *raised: Any) -> None:
        """Connects the timer, after all parts were created."""
        if self.watched and raised == (None, None, None):
            inputs = [component for each in self.watched.values() for component in each.inputs]
            outputs = [each.changed.render() for each in self.watched.values()]
            options: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
            gr.Timer(INTERVAL).tick(show_errors(self.digests), inputs, outputs, **options)
        super().__exit__(*raised)

    def digests(self, request: gr.Request, *values: Any) -> Any:
        """Digests of the stamps of all watched parts in their order, from the values of all their inputs."""
        found, left = [], list(values)
        for each in self.watched.values():
            given, left = left[: len(each.inputs)], left[len(each.inputs) :]
            stamp = json.dumps(each.stamp(request, *given), default=str)
            found.append(hashlib.blake2b(stamp.encode(), digest_size=8).hexdigest())
        return found if len(found) > 1 else found[0]


def watch(name: str, stamp: Callable[..., Any], inputs: Sequence[Any] = ()) -> gr.Textbox:
    """A hidden field of the page under construction whose `change` event tells that a stamp has changed.

    Args:
        name: of what is watched; parts that watch the same share its field.
        stamp: cheap summary of it for a request and the values of `inputs`.
        inputs: components, such as the choice of a run.
    """
    blocks = BlocksContext.root_block
    assert isinstance(blocks, WatchingBlocks), "a part that is watched outside of a page"
    if name not in blocks.watched:
        changed = gr.Textbox(label=name, visible="hidden", render=False)
        blocks.watched[name] = _Watched(stamp, inputs, changed)
    return blocks.watched[name].changed
