"""`veneer merge`, `veneer extract` and `veneer resize`: files and errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from veneer.pipelines.convert import ConvertConfig, convert
from veneer.pipelines.extract import ExtractConfig, extract
from veneer.pipelines.merge import MergeConfig, merge
from veneer.pipelines.resize import ResizeConfig, resize

import veneer
from tests.formats.cases import deltas, fill, header
from tests.raising import raises
from veneer import formats
from veneer.adapter_merging import CombineError, is_mergeable
from veneer.cli import main
from veneer.formats import native
from veneer.injection import LoadError, SaveError, VeneerError, attach
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline

WHERE = ["attn", "conv.io", "text/attn.q"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_pipeline("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[dict[str, Tensor]]]:
    """Two adapters, the first in kohya's and in the native layout, the second in diffusers'; and their changes."""
    folder = tmp_path_factory.mktemp("files")
    first = fill(attach(tiny_pipeline("sd"), "lora", where=WHERE, rank=4, alpha=3.0), 1)
    second = fill(attach(tiny_pipeline("sd"), "lora", where=WHERE[:1], rank=2), 2)
    paths = {
        "kohya": formats.formats.get("kohya")().save(first, folder / "kohya"),
        "native": native.save(first, folder / "native", {"base": str(base)}),
        "diffusers": formats.formats.get("diffusers")().save(second, folder / "diffusers"),
    }
    return paths, [deltas(first), deltas(second)]


def loaded(path: Path) -> dict[str, Tensor]:
    return deltas(veneer.load(tiny_pipeline("sd"), path))


def told(lines: list[str]) -> float:
    """The total error in the printed text."""
    found = re.search(r"relative error (\S+)", lines[1])
    assert found is not None
    return float(found[1])


def test_files_of_two_formats_become_one_of_the_first(files: Any, base: Path, tmp_path: Path) -> None:
    paths, (first, second) = files
    config = MergeConfig((paths["kohya"], paths["diffusers"]), ("0.7", "-0.5"), base=str(base), out=tmp_path / "both")
    lines = merge(config)
    assert lines[0] == str(tmp_path / "both.safetensors")
    assert told(lines) < 1e-6
    assert formats.inspect(tmp_path / "both").format == "kohya"
    got = loaded(tmp_path / "both")
    assert got.keys() == first.keys()
    for name, delta in first.items():
        torch.testing.assert_close(got[name], 0.7 * delta - 0.5 * second.get(name, torch.zeros(())), rtol=1e-5, atol=1e-7)
    with raises(SaveError, given="exists"):
        merge(config)


def test_the_command_merges_by_parts_of_the_model(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The native file, which is not the first, names the base model."""
    paths, (first, second) = files
    words = ["merge", str(paths["diffusers"]), str(paths["native"]), "--weights", "-0.5", "attn=0.25;text/attn=0"]
    words += ["--method", "svd", "--rank", "5", "--out", str(tmp_path / "x.safetensors"), "--to", "native"]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    got = loaded(tmp_path / "x")
    assert {k.partition(".")[0] for k in got} == {"unet"}
    apart = size = 0.0
    for name in got:
        part = 1.0 if "conv" in name else 0.25
        wanted = part * first[name] - 0.5 * second.get(name, torch.zeros(()))
        apart, size = apart + float((wanted - got[name]).pow(2).sum()), size + float(wanted.pow(2).sum())
    assert told(printed) == pytest.approx((apart / size) ** 0.5, rel=0.02)
    assert told(printed) > 1e-3


def test_dtype_of_the_file(files: Any, base: Path, tmp_path: Path) -> None:
    lines = resize(ResizeConfig(files[0]["kohya"], rank=2, base=str(base), dtype="float16", out=tmp_path / "half"))
    tensors = load_file(tmp_path / "half.safetensors")
    assert {t.dtype for k, t in tensors.items() if not k.endswith("alpha")} == {torch.float16}
    first, got = files[1][0], loaded(tmp_path / "half")
    apart = sum(float((first[n] - got[n]).pow(2).sum()) for n in first) / sum(float(d.pow(2).sum()) for d in first.values())
    assert told(lines) == pytest.approx(apart**0.5, rel=0.02)


def test_resize_from_a_native_file_knows_its_base(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["resize", str(files[0]["native"]), "--error", "0.4", "--rank", "3", "--out", str(tmp_path / "r"), "--to", "kohya"]
    assert main(words) == 0
    assert "21 weights, ranks 2 to 3, relative error " in capsys.readouterr().out
    ranks = {k: t.shape[0] for k, t in load_file(tmp_path / "r.safetensors").items() if "lora_down" in k}
    wanted = {}
    for name, delta in files[1][0].items():
        s = torch.linalg.svdvals(delta.flatten(1)).square()
        wanted[name] = next(k for k in (1, 2, 3) if k == 3 or float(s[k:].sum() / s.sum()) <= 0.4**2)
    assert sorted(ranks.values()) == sorted(wanted.values())
    assert header(tmp_path / "r.safetensors")["__metadata__"]["provenance"].count("native.safetensors") == 1


def test_extract_from_folders(base: Path, files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_pipeline("sd")
    tuned = veneer.load(pipe, files[0]["kohya"])
    tuned.merge()
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)
    pipe.save_pretrained(tmp_path / "tuned")
    words = ["extract", str(tmp_path / "tuned"), "--base", str(base), "--rank", "4", "--to", "kohya"]
    assert main([*words, "--out", str(tmp_path / "x")]) == 0
    printed = capsys.readouterr().out
    assert "not included: 1 other tensors differ (relative to their norm: unet.conv_out.bias" in printed
    first, got = files[1][0], loaded(tmp_path / "x")
    assert got.keys() == first.keys()
    assert all(torch.allclose(got[n], delta, rtol=0, atol=1e-5) for n, delta in first.items())


def test_what_must_be_said(files: Any, base: Path, tmp_path: Path) -> None:
    kohya = files[0]["kohya"]
    with raises(OptionError, option="out", method="merge"):
        merge(MergeConfig((kohya,), base=str(base)))
    with raises(OptionError, option="base", method="merge"):
        merge(MergeConfig((kohya,), out=tmp_path / "x"))
    with raises(OptionError, option="weights", method="merge", given="attn"):
        merge(MergeConfig((kohya,), ("attn",), base=str(base), out=tmp_path / "x"))
    with raises(OptionError, option="rank", method="resize"):
        resize(ResizeConfig(kohya, base=str(base), out=tmp_path / "x"))
    with raises(OptionError, option="base", method="extract"):
        extract(ExtractConfig(str(base), rank=2))
    assert list(tmp_path.iterdir()) == []


def pivotal(path: Path, base: Path, token: Any, seed: int, vectors: int = 1) -> tuple[Path, Tensor, dict[str, Tensor]]:
    """A file with a token and a LoRA, as the app trains by default; the token's embeddings, and the LoRA's weight updates."""
    pipe = tiny_pipeline("sd")
    learned = fill(attach(pipe, "textual_inversion", tokens=token, initialize="toy", vectors=vectors), seed)
    lora = fill(attach(pipe, "lora", where=WHERE, rank=2), seed)
    native.save([learned, lora], path, {"base": str(base)})
    return path, rows(learned), deltas(lora)


def rows(attachment: Any) -> Tensor:
    (part,) = attachment.parts.values()
    return part[1].vectors.detach().clone()


def tokens_of(path: Path) -> dict[str, Tensor]:
    """Token to its embeddings, in any file format that supports them."""
    learned = [a for a in formats.load_all(tiny_pipeline("sd"), path) if a.method.name == "textual_inversion"]
    return {t: r for a in learned for t, r in zip(a.method.each, rows(a).split(a.method.vectors), strict=True)}


@pytest.mark.parametrize("form", ["native", "onetrainer", "kohya"])
def test_the_tokens_of_pivotal_files_go_along_into_a_merge(base: Path, tmp_path: Path, form: Any) -> None:
    one, first, before = pivotal(tmp_path / "one.safetensors", base, "<one>", 1)
    two, second, after = pivotal(tmp_path / "two.safetensors", base, "<two>", 2, vectors=2)
    lines = merge(MergeConfig((one, two), ("0.5", "2"), out=tmp_path / "out" / "both", to=form))
    beside = [] if form != "kohya" else [tmp_path / "out" / "one.safetensors", tmp_path / "out" / "two.safetensors"]
    assert lines[: 1 + len(beside)] == [*map(str, [tmp_path / "out" / "both.safetensors", *beside])]
    assert sorted((tmp_path / "out").iterdir()) == sorted([tmp_path / "out" / "both.safetensors", *beside])
    found = {k: t for path in beside or [tmp_path / "out" / "both.safetensors"] for k, t in tokens_of(path).items()}
    assert found.keys() == {"<one>", "<two>"}
    assert torch.equal(found["<one>"], first)
    assert torch.equal(found["<two>"], second)
    (lora,) = (a for a in formats.load_all(tiny_pipeline("sd"), tmp_path / "out" / "both") if a.method.name == "lora")
    for name, delta in deltas(lora).items():
        torch.testing.assert_close(delta, 0.5 * before[name] + 2 * after[name], rtol=1e-5, atol=1e-7)


def test_a_token_file_beside_a_lora_has_one_token_and_its_name(base: Path, tmp_path: Path) -> None:
    """A1111 rejects a file of several tokens, and takes the file name as the trigger."""
    both, learned, _ = pivotal(tmp_path / "both.safetensors", base, ("<toy~car>", "<b>"), 1)
    convert(ConvertConfig(both, "kohya", out=tmp_path / "b.safetensors"))
    kept = [tmp_path / "toy-car.safetensors", tmp_path / "embeddings" / "b.safetensors"]
    assert [list(tokens_of(path)) for path in kept] == [["<toy~car>"], ["<b>"]]
    assert torch.equal(torch.cat([t for path in kept for t in tokens_of(path).values()]), learned)
    convert(ConvertConfig(both, "diffusers", out=tmp_path / "d.safetensors"))  # the same tokens are there already
    other, _, _ = pivotal(tmp_path / "other.safetensors", base, "<toy~car>", 2)
    with raises(SaveError, where="<toy~car>", given="exists"):
        convert(ConvertConfig(other, "kohya", out=tmp_path / "e.safetensors"))
    with raises(SaveError, where="<toy~car>", given="exists"):
        resize(ResizeConfig(other, rank=1, to="kohya", out=tmp_path / "e.safetensors"))
    assert not (tmp_path / "e.safetensors").exists()


def test_two_files_with_the_same_token(base: Path, tmp_path: Path) -> None:
    one, first, _ = pivotal(tmp_path / "one.safetensors", base, "<toy>", 1)
    two, _, _ = pivotal(tmp_path / "two.safetensors", base, "<toy>", 2)
    with raises(CombineError, where="<toy>", given=("one.safetensors", "two.safetensors")):
        merge(MergeConfig((one, two), out=tmp_path / "x.safetensors"))
    assert not (tmp_path / "x.safetensors").exists()
    merge(MergeConfig((one, one), out=tmp_path / "same.safetensors"))
    found = tokens_of(tmp_path / "same.safetensors")
    assert list(found) == ["<toy>"]
    assert torch.equal(found["<toy>"], first)


def test_tokens_alone_are_merged_into_one_file(base: Path, tmp_path: Path) -> None:
    paths = []
    for token, seed in (("<a>", 1), ("<b>", 2)):
        learned = fill(attach(tiny_pipeline("sd"), "textual_inversion", tokens=token), seed)
        paths.append(formats.embeddings.save(learned, tmp_path / token.strip("<>"), {"base": str(base)}))
    merge(MergeConfig(tuple(paths), base=str(base), out=tmp_path / "ab.safetensors"))
    assert formats.inspect(tmp_path / "ab.safetensors").words == ("<a>", "<b>")
    both, _, _ = pivotal(tmp_path / "both.safetensors", base, "<c>", 1)
    merge(MergeConfig((*paths, both), out=tmp_path / "abc.safetensors"))
    assert formats.inspect(tmp_path / "abc.safetensors").format == "native"
    assert list(tokens_of(tmp_path / "abc.safetensors")) == ["<a>", "<b>", "<c>"]
    with raises(VeneerError, file=paths[0], where="rank", given="embeddings"):
        resize(ResizeConfig(paths[0], rank=2, base=str(base), out=tmp_path / "x"))


def test_a_pivotal_file_is_resized_with_its_token(base: Path, tmp_path: Path) -> None:
    both, learned, before = pivotal(tmp_path / "both.safetensors", base, "<toy>", 1)
    resize(ResizeConfig(both, rank=1, out=tmp_path / "small.safetensors"))
    assert torch.equal(tokens_of(tmp_path / "small.safetensors")["<toy>"], learned)
    (lora,) = (a for a in formats.load_all(tiny_pipeline("sd"), tmp_path / "small") if a.method.name == "lora")
    assert deltas(lora).keys() == before.keys()
    assert {site.rank for site in [lora.method]} == {1}


def test_what_can_be_merged(files: Any, base: Path, tmp_path: Path) -> None:
    both, _, _ = pivotal(tmp_path / "both.safetensors", base, "<toy>", 1)
    mergeable = [both, *files[0].values()]
    pipe = tiny_pipeline("sd")
    control = native.save(attach(pipe, "controlnet"), tmp_path / "control")
    trained = native.save(attach(pipe, "lora", rank=2, train=("norm",)), tmp_path / "trained")
    probe = native.save(attach(tiny_pipeline("sd").unet, "lora", rank=2), tmp_path / "bare")
    (tmp_path / "broken.safetensors").write_text("no file")
    others = [control, trained, probe, tmp_path / "broken.safetensors", tmp_path / "away.safetensors"]
    assert [is_mergeable(path) for path in mergeable] == [True] * len(mergeable)
    assert [is_mergeable(path) for path in others] == [False] * len(others)


def test_files_that_do_not_fit_leave_nothing(files: Any, base: Path, tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    loras = [
        fill(attach(pipe, "lora", where=part, rank=2, name=name)) for part, name in (("attn.q", "first"), ("conv.io", "second"))
    ]
    both = native.save(loras, tmp_path / "two", {"base": str(base)})
    with raises(CombineError, file=both, given=("first", "second"), expected=1):
        merge(MergeConfig((both, files[0]["kohya"]), out=tmp_path / "x"))
    with pytest.raises(LoadError) as caught:
        merge(MergeConfig((files[0]["kohya"],), base=str(other(tmp_path)), out=tmp_path / "x"))
    assert caught.value.unused
    assert not (tmp_path / "x.safetensors").exists()


def other(folder: Path) -> Path:
    """A base of another family."""
    tiny_pipeline("pixart").save_pretrained(folder / "other")
    return folder / "other"
