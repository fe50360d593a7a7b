"""The page of adapters' files: what is in them, what is refused and why, and what is made of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from safetensors.torch import load_file, save_file
from veneer.apps.components import AppBlocks
from veneer.apps.context import Context
from veneer.apps.limits import LIMITS
from veneer.apps.pages.adapters import adapters_page, files
from veneer.apps.pages.adapters.details import FORMATS, describe_file, describe_fit
from veneer.apps.workspace import Workspace
from veneer.pipelines.convert import To

import veneer
from tests.formats.cases import fill
from tests.raising import raises
from veneer.formats import inspect, kohya, native
from veneer.injection import VeneerError, attach
from veneer.injection.errors import OptionError, StateError, UnknownName
from veneer.testing.pipelines import tiny_pipeline


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a LoRA of rank 4 in two formats, another LoRA, and a token embedding."""
    folder = tmp_path_factory.mktemp("given")
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(folder / "base")
    lora = fill(attach(pipe, "lora", where="attn", rank=4))
    lora.save(folder / "toy.safetensors")
    kohya.save(lora, folder / "toy-kohya.safetensors")
    lora.detach()
    other = fill(attach(pipe, "lora", where="attn", rank=2))
    other.save(folder / "other.safetensors")
    other.detach()
    native.save(fill(attach(pipe, "textual_inversion", tokens=("<one>", "<two>"))), folder / "word.safetensors")
    return folder


@pytest.fixture
def workspace(tmp_path: Path, given: Path) -> Workspace:
    """With `toy` and `other` in it."""
    found = Workspace(tmp_path)
    for name in ("toy", "other"):
        files.store_upload(found, given / f"{name}.safetensors")
    return found


def test_describe_file(workspace: Workspace, given: Path) -> None:
    page = adapters_page.describe_adapter(workspace, "toy")
    for told in ("<dd>lora</dd>", "<dd>native</dd>", "<dd>4</dd>", "not stated in the file", "<td>lora</td>"):
        assert told in page, told
    assert f"{sum(t.numel() for t in load_file(given / 'toy.safetensors').values()):,} in" in page
    files.store_upload(workspace, given / "word.safetensors")
    assert "<dd>&lt;one&gt;, &lt;two&gt;</dd>" in adapters_page.describe_adapter(workspace, "word")
    assert "Choose an adapter" in adapters_page.describe_adapter(workspace, None)
    assert "No adapter yet" in adapters_page.describe_adapter(Workspace(workspace.root, "someone"), None)


def test_file_content_is_escaped(workspace: Workspace, tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>"
    save_file({bad: torch.ones(2, 768)}, tmp_path / "evil.safetensors", {"format": "pt", bad: "x"})
    name = files.store_upload(workspace, tmp_path / "evil.safetensors")
    page = adapters_page.describe_adapter(workspace, name)
    assert "&lt;img src=x" in page
    assert "<img" not in page


def test_compatibility_report(workspace: Workspace, given: Path, tmp_path: Path) -> None:
    base = str(given / "base")
    assert "Compatible with" in adapters_page.check_fit(workspace, "toy", base)
    tensors = load_file(given / "toy-kohya.safetensors")
    gone = next(key for key in tensors if key.endswith("lora_up.weight"))
    kept = {key: t for key, t in tensors.items() if key != gone} | {"lora_unet_elsewhere.lora_up.weight": torch.ones(2, 2)}
    save_file(kept, tmp_path / "part.safetensors", {"format": "pt"})
    page = adapters_page.check_fit(workspace, files.store_upload(workspace, tmp_path / "part.safetensors"), base)
    assert "Compatible with" not in page
    assert "lora_unet_elsewhere" in page
    with raises(VeneerError, where="base", given="/no/such"):
        adapters_page.check_fit(workspace, "toy", "/no/such")
    with raises(OptionError, option="base", given=""):
        adapters_page.check_fit(workspace, "toy", " ")


def refused(workspace: Workspace, path: Path) -> str:
    before = sorted(workspace.adapters.iterdir())
    name, words = adapters_page.upload(workspace, path)
    assert name is None
    assert sorted(workspace.adapters.iterdir()) == before
    assert str(path.parent) not in words, "nothing of where it was uploaded to"
    return words


def test_rejected_files_give_a_reason(workspace: Workspace, given: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}) + b" " * 100)
    assert "x.safetensors: a pickle under the name of a safetensors file" in refused(workspace, path)
    torch.save({"a": torch.ones(2)}, path)
    assert "a zip archive, as torch.save writes" in refused(workspace, path)
    path.write_bytes((given / "toy.safetensors").read_bytes()[:-40])
    assert "truncated" in refused(workspace, path)
    path.write_text("<!doctype html><html><body>Not found</body></html>")
    told = refused(workspace, path)
    assert "a text file" in told
    assert "<html>" not in told
    save_file({f"model.diffusion_model.block.{i}.weight": torch.ones(2, 2) for i in range(3)}, path)
    assert "whole model" in refused(workspace, path)


def test_rename_and_delete(workspace: Workspace) -> None:
    assert files.rename(workspace, "toy", "toy") == "toy", "no other file is in the way"
    assert files.rename(workspace, "toy", "../../my <toy>.safetensors") == "my-toy"
    assert sorted(workspace.all_adapters()) == ["my-toy", "other"]
    with raises(OptionError, option="name", given="other"):
        files.rename(workspace, "my-toy", "other")
    with raises(OptionError, option="name", given=""):
        files.rename(workspace, "my-toy", " ")
    with raises(UnknownName, name="../other", kind="adapter"):
        files.delete(workspace, "../other")
    files.delete(workspace, "my-toy")
    assert sorted(workspace.all_adapters()) == ["other"]


def test_file_of_a_job_cannot_be_renamed_or_deleted(workspace: Workspace, given: Path) -> None:
    run = workspace.jobs / "x" / "run"
    run.mkdir(parents=True)
    (run.parent / "job.json").write_text('{"title": "trained"}')
    (run / "adapter.safetensors").write_bytes((given / "toy.safetensors").read_bytes())
    (name,) = (n for n in workspace.all_adapters() if n.startswith("trained"))
    assert "<dd>lora</dd>" in adapters_page.describe_adapter(workspace, name)
    for action in (lambda: files.rename(workspace, name, "y"), lambda: files.delete(workspace, name)):
        with raises(StateError, where=name, given="of a job"):
            action()
    assert files.resize_adapter(workspace, name, str(given / "base"), 1, None, None).name == "trained-x-rank-1"


def test_embeddings_are_saved_beside_formats_without_them(workspace: Workspace, given: Path) -> None:
    pipe = veneer.base_models.load(str(given / "base"))
    both = [veneer.attach(pipe, "textual_inversion", tokens="<toy>", initialize="cat"), veneer.attach(pipe, "lora", rank=2)]
    native.save(both, workspace.adapters / "both.safetensors", {"base": str(given / "base")})
    made = files.convert_adapter(workspace, "both", "kohya", str(given / "base"))
    assert [path.name for path in made.embeddings] == ["toy.safetensors"], "its name is the trigger"
    assert inspect(made.embeddings[0]).words == inspect(workspace.adapter("toy-2")).words == ("<toy>",), "there is another toy"
    *_, offered = adapters_page.show_new_file(workspace, made)
    assert [Path(each["path"]).name for each in offered.value] == ["both-kohya.safetensors", "toy.safetensors"]
    assert str(workspace.root) not in made.report
    again = files.convert_adapter(workspace, "both", "kohya", str(given / "base"))
    assert [path.name for path in again.embeddings] == ["toy.safetensors"]
    assert "toy-3" not in workspace.all_adapters(), "it is the same token"
    assert not files.convert_adapter(workspace, "toy", "kohya", str(given / "base")).embeddings
    resized = files.resize_adapter(workspace, "both", str(given / "base"), 1, None, None)
    assert inspect(resized.file).words == ("<toy>",)
    assert not list(workspace.folder.glob(".making-*"))


def test_convert(workspace: Workspace, given: Path) -> None:
    base = str(given / "base")
    made = files.convert_adapter(workspace, "toy", "kohya", base)
    assert made.name == "toy-kohya"
    assert inspect(workspace.adapter("toy-kohya"), tiny_pipeline("sd")).fits
    assert "weight updates are equal" in made.report
    assert str(workspace.root) not in made.report
    assert files.convert_adapter(workspace, "toy", "kohya", base).name == "toy-kohya-2", "the first one stays"
    folder = files.convert_adapter(workspace, "toy", "peft_folder", base)
    assert folder.name is None
    assert folder.file.suffix == ".zip"
    with pytest.raises(VeneerError) as error:
        files.convert_adapter(workspace, "toy", "xlabs", base)
    assert str(workspace.root) not in str(error.value)
    assert not [path for path in workspace.adapters.iterdir() if path.suffix != ".safetensors"], "no leftovers"


def test_merge_is_the_weighted_sum(workspace: Workspace, given: Path) -> None:
    base = str(given / "base")
    made = files.merge_adapters(workspace, ["toy", "other"], [0.5, -2], base, "sum", None, None)
    assert (made.name, made.file.exists()) == ("toy-and-other-merged", True)

    def changes(name: str, model: Any) -> dict[str, torch.Tensor]:
        lora = veneer.load(model, workspace.adapter(name))
        return {key: adapter.weight(torch.zeros(site.weight_shape)) for key, (site, adapter) in lora.parts.items()}

    found = [changes(name, tiny_pipeline("sd")) for name in ("toy", "other", "toy-and-other-merged")]
    for key, toy in found[0].items():
        torch.testing.assert_close(found[2][key], 0.5 * toy - 2 * found[1][key])
    for names, weights, option in (
        (["toy"], [1.0], "adapters"),
        (["toy", "other"], [1.0, None], "weights"),
        (["toy", "other"], [1.0, float("nan")], "weights"),
    ):
        with raises(OptionError, option=option):
            files.merge_adapters(workspace, names, weights, base, "sum", None, None)  # type: ignore[arg-type]


def test_merge_list_has_only_mergeable_adapters(workspace: Workspace, given: Path) -> None:
    control = attach(tiny_pipeline("sd"), "controlnet")
    native.save(control, workspace.adapters / "control.safetensors")
    files.store_upload(workspace, given / "word.safetensors")
    chosen, several, known = adapters_page.refresh_list(workspace, None, None)
    assert known == ["control", "other", "toy", "word"]
    assert [value for _, value in chosen.choices] == known
    assert [value for _, value in several.choices] == ["other", "toy", "word"]


def test_resize(workspace: Workspace, given: Path) -> None:
    made = files.resize_adapter(workspace, "toy", str(given / "base"), 2, 1.0, "kohya")
    assert {rank for block in inspect(made.file).blocks for rank in block.ranks} == {2}
    assert "rank 2, relative error" in made.report
    less = files.resize_adapter(workspace, "toy", str(given / "base"), 4, 0.5, None)
    assert max(rank for block in inspect(less.file).blocks for rank in block.ranks) < 4, "half of the energy needs a lower rank"
    for rank in (None, 0, 1.5):
        with raises(OptionError, option="rank", given=rank):
            files.resize_adapter(workspace, "toy", str(given / "base"), rank, None, None)


def test_adapter_limit(workspace: Workspace, given: Path) -> None:
    one = (given / "toy.safetensors").read_bytes()
    for i in range(LIMITS.adapter_files - 2):
        (workspace.adapters / f"{i}.safetensors").write_bytes(one)
    with raises(VeneerError, where="adapters", given=LIMITS.adapter_files, expected=LIMITS.adapter_files):
        files.convert_adapter(workspace, "toy", "kohya", str(given / "base"))
    with raises(VeneerError, where="adapters", given=LIMITS.adapter_files, expected=LIMITS.adapter_files):
        files.example(workspace)


def test_unused_file_stem(workspace: Workspace) -> None:
    (workspace.adapters / "Made.safetensors").touch()
    (workspace.adapters / "made-2.safetensors").touch()
    assert files._free_stem(workspace, "made") == "made-3"
    assert files._free_stem(workspace, "other-thing") == "other-thing"


def test_list_finds_new_adapters_and_keeps_the_selection(workspace: Workspace) -> None:
    chosen, several, known = adapters_page.refresh_list(workspace, "toy", None)
    assert (chosen.value, known) == ("toy", ["other", "toy"])
    assert [value for _, value in several.choices] == known
    assert all(part == gr.skip() for part in adapters_page.refresh_list(workspace, "toy", known))
    files.delete(workspace, "toy")
    assert adapters_page.refresh_list(workspace, "toy", known)[0].value == "other"


def test_example_adapter(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert files.example(workspace) == files.example(workspace) == "example-lora"
    assert files.base_of_adapter(workspace, "example-lora") == "bundled"
    found = files.inspect(workspace, "example-lora", "bundled")
    assert "Compatible with bundled" in describe_fit(found, "bundled")
    assert "<dd>bundled</dd>" in describe_file(found, "bundled")


def test_every_writable_format_is_listed() -> None:
    assert set(FORMATS) == set(To.__args__)  # type: ignore[attr-defined]


def test_page_builds(tmp_path: Path) -> None:
    with AppBlocks() as page:
        adapters_page.build(Context.create(tmp_path))
    unnamed = [c for c in page.blocks.values() if isinstance(c, (gr.Dropdown, gr.Textbox, gr.File)) and not c.label]
    assert not unnamed
