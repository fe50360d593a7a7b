"""A small page behind the same middleware as the app: `python -m tests.apps.small_server ROOT [NAME:PASSWORD]`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from veneer.apps import components
from veneer.apps.context import escape_markup, show_errors
from veneer.apps.limits import LIMITS
from veneer.apps.request_limits import LimitsMiddleware
from veneer.apps.server import LOOPBACK_NAMES, _cache

from veneer.injection import VeneerError

SMALL = replace(LIMITS, file_bytes=200_000, request_bytes=20_000, logins=5)
"""Limits that a test reaches."""


def page(root: Path) -> gr.Blocks:
    """Builds the page from the texts in `words.json`; its first event waits for a file `turn`."""
    words = json.loads((root / "words.json").read_text())

    def slow(text: str) -> str:
        end = time.monotonic() + 120
        while not (root / "turn").exists() and time.monotonic() < end:
            time.sleep(0.05)
        return text

    def refuse() -> None:
        raise VeneerError("\n\n".join(words))

    with components.AppBlocks(analytics_enabled=False, delete_cache=(3600, 3600)) as found:
        text, picture, told = gr.Textbox(label="Text"), gr.Image(type="pil", label="Picture"), gr.Textbox(label="Told")
        gr.Button("Slow").click(slow, text, told, api_name="slow", concurrency_limit=1)
        picture.upload(lambda image: str(image.size), picture, told, api_name="look")
        gr.Button("Refuse").click(show_errors(refuse), None, None)
        number = gr.Number(label="Steps", precision=0, minimum=1, maximum=9)
        gr.Button("Count").click(lambda n: str(n), number, told, api_name="count")
        gr.Markdown("\n\n".join(map(escape_markup, words)), elem_id="markdown")
        gr.HTML("".join(f'<p title="{escape_markup(each)}">{escape_markup(each)}</p>' for each in words), elem_id="html")
    return found.queue(max_size=3, api_open=False)


def serve(root: Path, login: str | None) -> None:
    """Serves until it is killed."""
    files = _cache(root)
    components.install_limits()
    found = page(root)
    _, address, _ = found.launch(
        server_name="127.0.0.1",
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        allowed_paths=[],
        auth=[tuple(each.split(":")) for each in login.split(",")] if login else None,
        max_file_size=SMALL.file_bytes,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        app_kwargs={
            "middleware": [Middleware(LimitsMiddleware, hosts=None if login else LOOPBACK_NAMES, files=files, limits=SMALL)]
        },
    )
    (root / "address.tmp").write_text(address)
    (root / "address.tmp").rename(root / "address")
    found.block_thread()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
