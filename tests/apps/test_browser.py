"""The running app in Chromium."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from veneer.apps.pages import pages

from tests.apps.browser import (
    GRADIO_ASSETS,
    PATIENCE,
    PHONE,
    WIDE,
    App,
    Browser,
    Small,
    findings,
    go,
    is_of_line_plot,
    tabs,
    wait_for_rest,
)


@pytest.mark.parametrize(("size", "dark"), [(WIDE, False), (PHONE, True)], ids=["wide-light", "phone-dark"])
def test_every_page_opens(app: App, chromium: Browser, size: tuple[int, int], dark: bool) -> None:
    """Without errors, external requests, horizontal scrolling or accessibility violations."""
    page = chromium.open(app, size, dark)
    names = tabs(page)
    assert names == [each.name for each in pages()], "all are seen, on a phone too"
    grave = []
    for name in names:
        go(page, name)
        wait_for_rest(page)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{name} is wider than the window"
        grave += [f"{name}: {finding}" for finding in findings(page)]
    page.context.close()
    chromium.check()
    assert not grave, "\n".join(grave)


def test_workspace_is_created_with_private_permissions(app: App) -> None:
    assert app.workspace.is_dir()
    assert app.workspace.stat().st_mode & 0o077 == 0, "for nobody else on this machine"
    assert Path(app.workspace, "cache").is_dir()


EVIL = [
    "# head", "- item", "+ item", "1. item", "2) item", "> quote", "    code", "***", "a | b", "[x](http://e.example)",
    "![x](//e.example/x.png)", "<b onclick='x'>b</b>", "<img src=http://e.example/x.png onerror=alert(1)>",
    "<script>alert(1)</script>", "`code`", "$$x^2$$", "$x$", "http://e.example/x", "www.e.example", "a@e.example", "&lt;",
    "&#60;b&#62;", "\\*a\\*", "~~x~~", "_x_ **y**", ":smile:", "x == y", "\\(x\\)", "\u732b \u00f1 \u202egnp",
    "\"quoted\" and 'so'", "{{ x }} ${x} %s", "- [ ] done", "[^1]", "<!-- x -->", "x < y & y > z", "http&#58;//x",
    "@x #y",
]  # fmt: skip


def test_user_text_is_shown_literally(chromium: Browser, tmp_path: Path) -> None:
    """In Markdown, HTML and an error, as rendered by Gradio."""
    server = Small(tmp_path, words=EVIL)
    try:
        page = chromium.chromium.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        chromium.watch(page)
        page.goto(server.address)
        for place in ("markdown", "html"):
            page.locator(f"#{place} p").first.wait_for()
            shown = page.locator(f"#{place} p").evaluate_all("all => all.map(each => each.textContent)")
            assert [each.strip() for each in shown] == [each.strip() for each in EVIL], place
            assert page.locator(f"#{place} p *").count() == 0, f"{place}: marks were read"
        assert page.locator("#html p").evaluate_all("all => all.map(each => each.title)") == EVIL
        page.get_by_role("button", name="Refuse").click()
        error = page.get_by_test_id("toast-text").first
        error.wait_for()
        assert " ".join(error.inner_text().split()) == " ".join(" ".join(EVIL).split())
        assert error.locator("b, img, script, a").count() == 0
        page.close()
    finally:
        server.close()
    chromium.check()


LINE_PLOT = next(path.name for path in GRADIO_ASSETS.glob("Index-*.js") if "runAsync" in path.read_text())
OFFSET = "Cannot read properties of null (reading 'offsetWidth')"


@pytest.mark.parametrize(
    ("message", "scripts", "excluded"),
    [
        (OFFSET, (LINE_PLOT,), True),
        (OFFSET, (LINE_PLOT, "index-0.js"), True),
        (OFFSET, (), True),  # an error without a stack
        (OFFSET, ("index-0.js", LINE_PLOT), False),
        (OFFSET, (next(path.name for path in GRADIO_ASSETS.glob("Index-*.js") if path.name != LINE_PLOT),), False),
        (OFFSET, ("Index-none.js",), False),
        (OFFSET.replace("Width", "Height"), (LINE_PLOT,), False),
    ],
)
def test_only_the_error_of_the_line_plot_is_excluded(message: str, scripts: tuple[str, ...], excluded: bool) -> None:
    frames = [f"    at f (http://127.0.0.1:7860/assets/{script}:1:234)" for script in scripts]
    stack = "\n".join([f"TypeError: {message}", *frames])
    assert is_of_line_plot(SimpleNamespace(message=message, stack=stack)) == excluded
