"""`veneer merge`, `veneer extract` and `veneer resize`: files in, one file out, errors in the text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from veneer.pipelines.extract import ExtractConfig, extract
from veneer.pipelines.merge import MergeConfig, merge
from veneer.pipelines.resize import ResizeConfig, resize

import veneer
from veneer import formats
from veneer.cli import main
from veneer.combining import CombineError
from veneer.formats import native
from veneer.injection import LoadError, SaveError, VeneerError, attach
from veneer.testing.pipelines import tiny_pipeline

from ..formats.cases import deltas, fill, header

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
    found = re.search(r"error (\S+) of the change", lines[1])
    assert found is not None
    return float(found[1])


def test_files_of_two_formats_become_one_of_the_first(files: Any, base: Path, tmp_path: Path) -> None:
    paths, (first, second) = files
    config = MergeConfig((paths["kohya"], paths["diffusers"]), ("0.7", "-0.5"), base=str(base), out=tmp_path / "both")
    lines = merge(config)
    assert lines[0] == str(tmp_path / "both.safetensors")
    assert told(lines) < 1e-6
    assert formats.look(tmp_path / "both").format == "kohya"
    got = loaded(tmp_path / "both")
    assert got.keys() == first.keys()
    for name, delta in first.items():
        torch.testing.assert_close(got[name], 0.7 * delta - 0.5 * second.get(name, torch.zeros(())), rtol=1e-5, atol=1e-7)
    with pytest.raises(SaveError, match="it is there already"):
        merge(config)


def test_the_command_merges_by_parts_of_the_model(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base is told by the native file, which is not the first."""
    paths, (first, second) = files
    words = ["merge", str(paths["diffusers"]), str(paths["native"]), "--weights", "-0.5", "attn=0.25;text/attn=0"]
    words += ["--how", "svd", "--rank", "5", "--out", str(tmp_path / "x.safetensors"), "--to", "native"]
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
    assert "21 weights, ranks 2 to 3, error " in capsys.readouterr().out
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
    assert "not carried: 1 other tensors differ (relative to their norm: unet.conv_out.bias" in printed
    first, got = files[1][0], loaded(tmp_path / "x")
    assert got.keys() == first.keys()
    assert all(torch.allclose(got[n], delta, rtol=0, atol=1e-5) for n, delta in first.items())


def test_what_must_be_said(files: Any, base: Path, tmp_path: Path) -> None:
    kohya = files[0]["kohya"]
    with pytest.raises(VeneerError, match="--out"):
        merge(MergeConfig((kohya,), base=str(base)))
    with pytest.raises(VeneerError, match="--base is missing"):
        merge(MergeConfig((kohya,), out=tmp_path / "x"))
    with pytest.raises(VeneerError, match="weight 'attn' is neither a number nor PATTERN=NUMBER"):
        merge(MergeConfig((kohya,), ("attn",), base=str(base), out=tmp_path / "x"))
    with pytest.raises(VeneerError, match="--rank, --energy"):
        resize(ResizeConfig(kohya, base=str(base), out=tmp_path / "x"))
    with pytest.raises(VeneerError, match="--base, --out"):
        extract(ExtractConfig(str(base), rank=2))
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_fit_leave_nothing(files: Any, base: Path, tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    words = attach(pipe, "textual_inversion", tokens="<toy>", initialize="toy")
    both = native.save([words, fill(attach(pipe, "lora", rank=2))], tmp_path / "pivotal", {"base": str(base)})
    with pytest.raises(CombineError, match=r"holds .*textual_inversion.*lora.*only a single adapter can be taken"):
        merge(MergeConfig((both, files[0]["kohya"]), out=tmp_path / "x"))
    with pytest.raises(LoadError, match="unused"):
        merge(MergeConfig((files[0]["kohya"],), base=str(other(tmp_path)), out=tmp_path / "x"))
    assert not (tmp_path / "x.safetensors").exists()


def other(folder: Path) -> Path:
    """A base of another family."""
    tiny_pipeline("pixart").save_pretrained(folder / "other")
    return folder / "other"
