"""The catalog of methods: all of the registry, found by words, area and kind, with what they train on well-known models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr
import pytest
from torch import nn
from veneer.apps.context import Context
from veneer.apps.pages.methods import methods_page as page

import veneer
from tests.raising import raises
from veneer.full_size_models import MODELS, full_size
from veneer.injection import Adapter, Method, Need
from veneer.injection.errors import OptionError, UnknownName
from veneer.injection.sites import WeightSite
from veneer.method_catalog import catalog, count_parameters, methods_for
from veneer.method_search import USES


def names(html: str) -> list[str]:
    return re.findall(r"<summary><code>([^<]*)</code>", html)


def test_every_method_is_listed_with_its_docstring() -> None:
    html = page.render_methods("", "", "", "name", "")
    assert names(html) == veneer.methods.names()
    lora = next(m for m in catalog() if m.name == "lora")
    assert (lora.kind, lora.source, lora.needs) == ("reparameterized", "veneer", "weights of layers")
    assert lora.about.startswith("LoRA: a low-rank update")
    assert lora.formula.startswith("W' = W + s·B A")
    assert "Deviations:" in lora.text
    rank, init = (next(o for o in lora.options if o.name == name) for name in ("rank", "init"))
    assert (rank.type, rank.default) == ("int", "8")
    assert "at least 1" in rank.about
    assert (init.type, init.default) == ("'kaiming' | 'gaussian' | 'pissa' | 'olora' | 'eva' | 'loftq'", "'kaiming'")
    assert all(m.about and m.paper and m.needs for m in catalog())


def test_search_and_filters() -> None:
    assert {"lora", "dora", "adalora"} <= set(names(page.render_methods("LOW-rank weight", "", "", "name", "")))
    assert "No method matches" in page.render_methods("nothingofthiskind", "", "", "name", "")
    of_kind = [name for name in veneer.methods.names() if ".selective." in veneer.methods.get(name).__module__]
    assert {"bitfit", "full", "fish_mask"} <= {*of_kind}
    assert names(page.render_methods("", "", "selective", "name", "")) == of_kind
    assert names(page.render_methods("bias", "", "selective", "name", ""))[0] == "bitfit"
    for wrong, option, given in (
        (("", "sculpture", "", "name", ""), "area", "sculpture"),
        (("", "", "../x", "name", ""), "kind", "../x"),
        (("", "", "", "name", "GPT"), "model", "GPT"),
    ):
        with raises(OptionError, option=option, given=given):
            page.render_methods(*wrong)
    with raises(OptionError, option="model", given=""):
        page.render_methods("", "", "", "trained", "")


def test_grouping_by_use_with_recommendations() -> None:
    html = page.render_methods("", "", "", "use", "")
    assert sorted(names(html)) == veneer.methods.names(), "each once"
    assert "Start here" in html
    main = {method.uses[0] for method in catalog()}
    assert [*re.findall(r'<h2 class="use">([^<]*)<', html)] == [use.title for use in USES if use.key in main]
    assert set(re.findall(r"getElementById\('([^']*)'\)", html)) <= set(re.findall(r'id="([^"]*)"', html))
    vision = page.render_methods("", "vision", "", "use", "")
    assert set(names(vision)) == methods_for("vision")
    assert "controlnet" not in vision.partition("Start here")[2].partition("</section>")[0]
    assert names(page.render_methods("ip adapter", "", "", "use", ""))[0] == "ip_adapter"


def test_filter_by_use() -> None:
    """Also by a second use; recommended ones are first and marked."""
    html = page.render_methods("", "", "", "use", "", use="smallest_file")
    assert {"bitfit", "ia3", "textual_inversion"} <= set(names(html))
    assert "lora" not in names(html)
    marked = re.findall(r'<summary><code>([^<]*)</code> <span>[^<]*</span><span class="mark">', html)
    assert marked == names(html)[:2] == ["textual_inversion", "linear_probe"]
    assert names(page.render_methods("biases", "", "", "use", "", use="smallest_file"))[0] == "bitfit"
    with raises(OptionError, option="use", given="anything"):
        page.render_methods("", "", "", "use", "", use="anything")


def test_filter_by_area() -> None:
    vision, diffusion = methods_for("vision"), methods_for("diffusion")
    assert {"lora", "bitfit"} <= vision & diffusion
    assert {"vpt", "coop", "linear_probe", "tip_adapter"} <= vision - diffusion
    assert {"controlnet", "ip_adapter", "textual_inversion"} <= diffusion - vision
    assert set(names(page.render_methods("", "vision", "prompt", "name", ""))) <= vision


@pytest.mark.parametrize(
    ("model", "method", "trained"),
    [
        ("ViT-B/16", "lora", 4 * 12 * 8 * 2 * 768),
        ("ViT-B/16", "vpt", 12 * 10 * 768),
        ("ViT-B/16", "bitfit", 102_912),
        ("ViT-B/16", "controlnet", None),
        ("ViT-B/16", "full", 86_567_656),
    ],
)
def test_counts(model: str, method: str, trained: int | None) -> None:
    """From the formulas of the papers and the parameter count of the model."""
    count = count_parameters(model)[method]
    assert (count.trainable if count else None) == trained


def test_counts_are_shown_and_sorted() -> None:
    told: list[tuple[int, int]] = []
    html = page.render_methods("", "", "", "trained", "ViT-B/16", lambda done, of: told.append((done, of)))
    assert told[-1] == (len(veneer.methods.names()),) * 2
    assert "589,824 trainable" in html
    found = names(html)
    assert found.index("vpt") < found.index("lora") < found.index("full") < found.index("controlnet")


def test_full_size_models_match_the_published_ones() -> None:
    unet = full_size("Stable Diffusion 1.5").components["unet"]
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert all(p.is_meta for p in unet.parameters())
    assert "Stable Diffusion 1.5" in MODELS
    with raises(UnknownName, name="Stable Diffusion 9", expected=tuple(MODELS)):
        full_size("Stable Diffusion 9")


@pytest.fixture
def foreign() -> Iterator[type[Method]]:
    """A method of another package, with HTML in its docstring."""

    class Foreign(Method):
        """<script>alert(1)</script> doubles.

        Source: nobody. Counts: none.
        """

        name: ClassVar[str] = "foreign"
        paper: ClassVar[str] = "<b>Nobody</b>, 2030"
        needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite),)
        default: ClassVar[tuple[str, ...]] = ("attn",)

        def build(self, site: Any) -> Adapter:
            adapter = Adapter()
            adapter.gain = nn.Parameter(site.d_out * [0.0])  # type: ignore[arg-type]
            return adapter

    yield veneer.methods.register(Foreign)
    veneer.methods.unregister("foreign")


def test_registered_method_appears_escaped(foreign: type[Method]) -> None:
    html = page.render_methods("doubles", "", "", "name", "")
    assert names(html) == ["foreign"]
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; doubles." in html
    assert ("From register()", "register()") in page.kinds()
    assert names(page.render_methods("", "", "register()", "name", "")) == ["foreign"]


def test_page_builds(tmp_path: Path) -> None:
    with gr.Blocks() as blocks:
        page.build(Context.create(tmp_path))
    assert all(c.label for c in blocks.blocks.values() if isinstance(c, (gr.Dropdown, gr.Textbox)))
