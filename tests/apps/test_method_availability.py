"""Methods that the forms offer, the reason for the others, and options of methods as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from veneer.apps.context import Context
from veneer.apps.pages.classify.method_options import method_options
from veneer.apps.pages.classify.request import ClassifyRequest, submit_jobs
from veneer.apps.pages.methods import methods_page
from veneer.apps.pages.methods.availability import classifier_methods, pages_of, reason_not_offered
from veneer.apps.pages.personalize.form_values import method_summary
from veneer.apps.pages.personalize.request import command, method_names
from veneer.apps.pages.shared.config_form import fields_of, form_help
from veneer.apps.workspace import Workspace

from tests.apps.test_personalize_page import asked
from tests.raising import raises
from veneer.injection import UnknownOption, methods
from veneer.injection.errors import OptionError, UnknownName

COMMANDS_ONLY = {"adapter_fusion", "hyperformer", "hyperformer_plus_plus", "pet", "ppt"}
"""Methods that need several tasks, files of adapters, or images without labels."""


def test_methods_that_no_form_can_train_have_a_reason() -> None:
    assert {name for name in methods.names() if reason_not_offered(methods.get(name))} == COMMANDS_ONLY
    for name in COMMANDS_ONLY:
        assert f"--method {name}" in reason_not_offered(methods.get(name))
        assert pages_of(name) == ()
    assert {name for name in methods.names() if not pages_of(name)} == COMMANDS_ONLY


def test_lists_of_the_pages() -> None:
    images, texts = classifier_methods("bundled"), classifier_methods("bundled_clip")
    assert not COMMANDS_ONLY & {*images, *texts}
    assert {"mask", "diff_pruning", "prompt_tuning", "linear_probe"} <= {*images}
    assert {"pez", "maple", "zero_shot"} <= {*texts} - {*images}
    assert "linear_probe" not in texts, "the bundled CLIP has no head"
    photos = method_names(True)
    assert not COMMANDS_ONLY & {*photos}
    assert {"coda", "mona", "pez"}.isdisjoint(photos), "no sites in a UNet"
    assert {"lora", "mask", "diff_pruning"} <= {*photos}


@pytest.mark.parametrize("name", sorted(COMMANDS_ONLY))
def test_typed_names_of_such_methods_are_rejected(tmp_path: Path, name: str) -> None:
    """A dropdown accepts any text. The files of `adapter_fusion` would be any of the server."""
    context, workspace = Context.create(tmp_path), Workspace(tmp_path, "anna")
    request = ClassifyRequest(model="bundled_clip", methods=["lora", name], options="adapter_fusion.adapters=/etc/passwd")
    with raises(OptionError, option="methods", given=name):
        submit_jobs(context, workspace, request)
    with raises(OptionError, option="method", given=name, expected="another method"):
        command(asked(method=name), tmp_path)
    assert not workspace.all_jobs()


@pytest.mark.parametrize("name", ["coda", "mona", "pez", "vpt", "controlnet"])
def test_methods_without_sites_in_the_base_model_are_rejected(tmp_path: Path, name: str) -> None:
    with raises(OptionError, option="method", given=name, expected="a method of the list"):
        command(asked(method=name), tmp_path)
    with raises(UnknownName, name="lorra"):
        command(asked(method="textual_inversion+lorra"), tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("vpt", "Trained on the page</dt><dd>Classify<"), ("maple", "Classify, with a CLIP<"), ("ip_adapter", "<dd>Control<"),
     ("hyperformer", "Only as a command</dt><dd>It needs several tasks")],
)  # fmt: skip
def test_the_catalog_says_where_a_method_is_trained(name: str, text: str) -> None:
    assert text in methods_page.render_methods(name, "", "", "use", "").partition("</details>")[0]


def test_many_methods_of_a_use_are_grouped_by_kind() -> None:
    html = methods_page.render_methods("", "", "", "use", "", use="classification")
    headings = [heading.partition("<")[0].partition(":")[0] for heading in html.split('<h3 class="kind">')[1:]]
    assert headings == ["Selective", "Additive", "Prompt", "Reparameterized", "Hybrid"]
    assert html.index('id="method-linear_probe"') < html.index('<h3 class="kind">'), "recommended ones are before the groups"
    selective = html.split('<h3 class="kind">')[1]
    assert {"bitfit", "mask"} <= {name for name in methods.names() if f'id="method-{name}"' in selective}
    assert 'id="method-houlsby"' not in selective
    assert '<h3 class="kind">' not in methods_page.render_methods("", "", "", "use", "", use="control")


def test_options_of_each_method_are_flags_of_its_job(tmp_path: Path) -> None:
    text = "lora.rank=4 vpt.tokens=5 lora.rslora=true lora.by_site='mlp.*:rank=2 conv:rank=3' lora.init=kaiming"
    context, workspace = Context.create(tmp_path), Workspace(tmp_path)
    jobs, _ = submit_jobs(context, workspace, ClassifyRequest(methods=["lora", "vpt", "lora+ssf"], options=text))
    lora = ["--lora.rank=4", "--lora.rslora", "--lora.by-site", "mlp.*:rank=2", "conv:rank=3", "--lora.init=kaiming"]
    assert [[*job.command[job.command.index("--augment=flip") + 1 :]] for job in jobs] == [lora, ["--vpt.tokens=5"], lora]
    assert method_options("", ["zero_shot"]) == {"zero_shot": []}


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("rank=4", {"given": "rank=4"}),
        ("lora.rank", {"given": "lora.rank"}),
        ("--out=/etc", {"given": "--out=/etc"}),
        ("vpt.tokens=5", {"given": "vpt", "expected": ("lora",)}),
        ("lora.rank=many", {"option": "lora.rank", "given": "many"}),
        ("lora.rank='4", {"given": "lora.rank='4"}),
        ("lora.rslora=maybe", {"option": "lora.rslora", "given": "maybe"}),
    ],
)
def test_invalid_options(text: str, data: dict[str, object]) -> None:
    with raises(OptionError, **data):
        method_options(text, ["lora"])


def test_unknown_options() -> None:
    with raises(UnknownOption, name="ranks", where="lora"):
        method_options("lora.ranks=4", ["lora"])


def test_summary_of_a_method_says_what_it_does() -> None:
    """Before the formula, which few users read."""
    summary = method_summary("diff_pruning").split("\n\n")
    assert len(summary) == 2
    assert "Diff pruning" in summary[0]
    assert "hard concrete gates" in summary[1]


def test_help_of_a_field_has_no_python_and_no_emphasis() -> None:
    """Gradio reads two asterisks as emphasis, in code too."""
    (by_site,) = fields_of(methods.get("lora"), ["by_site"])
    assert "`mlp.*:rank=4`" in by_site.help
    assert "Python" not in by_site.help
    for name in methods.names():
        assert all(field.help.count("*") < 2 for field in fields_of(methods.get(name))), name
    assert form_help("`a.*` or `b.*`; None for none").count("*") == 0
