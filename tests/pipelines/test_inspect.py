"""`veneer inspect`: content of files of each format, and compatibility with a base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from veneer.pipelines.inspect_file import InspectConfig, inspect_file

import veneer
from tests.formats.cases import fill
from veneer.cli import main
from veneer.formats import diffusers, embeddings, inspect, kohya
from veneer.injection import LoadError, attach
from veneer.testing.pipelines import tiny_pipeline

FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "data" / "fixtures" / "lora_disney.safetensors"


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A small pipeline with LoRA at two ranks: rank 2 and alpha 3, and rank 4 and alpha 8 for values."""
    pipe = tiny_pipeline("sd")
    fill(
        attach(
            pipe, "lora", where=["attn", "conv.io", "text/attn"], rank=2, alpha=3.0, by_site={"attn.v": {"rank": 4, "alpha": 8.0}}
        )
    )
    return pipe


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter in three formats, and the base."""
    folder = tmp_path_factory.mktemp("inspect")
    (lora,) = veneer.attachments(pipe)
    kohya.save(lora, folder / "kohya")
    diffusers.save(lora, folder / "diffusers")
    lora.save(folder / "native")
    tiny_pipeline("sd").save_pretrained(folder / "base")
    return folder


def told(path: Path, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads("\n".join(inspect_file(InspectConfig(path, json=True, **options))))
    return found


@pytest.mark.parametrize("form", ["kohya", "diffusers", "native"])
def test_ranks_alphas_and_values_of_each_block(folder: Path, form: str) -> None:
    path = folder / f"{form}.safetensors"
    found = told(path)
    assert (found["format"], found["size"], found["tensors"]) == (form, path.stat().st_size, len(load_file(path)))
    text = [b for b in found["blocks"] if "layers" in b["name"]]
    assert len(text) == 3
    alphas = [] if form == "native" else [3.0, 8.0]  # the native header tells alphas by role, which only a model has
    for block in text:
        assert (block["method"], block["layers"], block["ranks"], block["alphas"]) == ("lora", 4, [2, 4], alphas)
        alone = 4 if form == "kohya" else 0  # alphas are numbers in the file, too
        assert block["values"] == 3 * 2 * (24 + 24) + 4 * (24 + 24) + alone
    assert sum(b["values"] for b in found["blocks"]) == sum(t.numel() for t in load_file(path).values())


@pytest.mark.parametrize("form", ["kohya", "diffusers", "native"])
def test_a_file_that_fits_its_base(folder: Path, form: str) -> None:
    found = told(folder / f"{form}.safetensors", base=str(folder / "base"))
    assert found["fits"] is True
    assert found["unused"] == found["missing"] == found["misshapen"] == []
    assert len(found["used"]) == len(load_file(folder / "diffusers.safetensors"))


def test_missing_unused_and_misshapen_tensors(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "diffusers.safetensors")
    down, up, other, *_ = state
    spoilt = {**state, other: torch.ones(7, 7), "unet.elsewhere.lora_A.weight": torch.ones(1, 1)}
    del spoilt[up if up.endswith("lora_B.weight") else down]
    save_file(spoilt, tmp_path / "x.safetensors")
    pipe = tiny_pipeline("sd")
    found = inspect(tmp_path / "x", pipe)
    assert found.fits is False
    assert found.unused == ("unet.elsewhere.lora_A.weight",)
    assert len(found.missing) == 1
    assert any("(7, 7)" in text for text in found.misshapen)
    assert veneer.attachments(pipe) == []
    assert "unused: 1\n  unet.elsewhere" in str(found)


def test_a_base_that_it_is_not_for(folder: Path) -> None:
    found = inspect(folder / "kohya", tiny_pipeline("dit"))
    assert found.fits is False
    assert "made for" in found.notes[0]


@pytest.mark.parametrize(
    ("width", "family"), [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "Stable Diffusion XL")]
)
def test_the_family_is_identified_by_the_text_width(tmp_path: Path, width: int, family: str) -> None:
    pipe = tiny_pipeline("sd", cross_attention_dim=width)
    lora = attach(pipe.unet, "lora", where="xattn", rank=2)
    for path in (kohya.save(lora, tmp_path / "kohya"), diffusers.save(lora, tmp_path / "diffusers")):
        assert inspect(path).family == family
    assert inspect(attach(pipe, "lora", where="xattn", rank=2).save(tmp_path / "native")).family == family


def test_names_alone_are_not_conclusive(tmp_path: Path) -> None:
    """A tiny model has FLUX's names, and none of its widths."""
    lora = attach(tiny_pipeline("flux"), "lora", rank=2)
    assert (
        inspect(kohya.save(lora, tmp_path / "kohya")).family
        is inspect(diffusers.save(lora, tmp_path / "diffusers")).family
        is None
    )


@pytest.mark.skipif(not FIXTURE.is_file(), reason="the published LoRA is not on this machine")
def test_a_published_file() -> None:
    found = inspect(FIXTURE)
    assert (found.format, found.family, found.tensors) == ("cloneofsimo", "Stable Diffusion 1", 386)
    rows = [(b.name, b.method, b.layers, b.ranks) for b in found.blocks]
    assert sorted(rows) == [
        ("<s1>", "textual_inversion", 1, ()),
        ("<s2>", "textual_inversion", 1, ()),
        ("text_encoder", "lora", 48, (1,)),
        ("unet", "lora", 144, (1,)),
    ]


def test_methods_ranks_and_alphas_of_other_adapters(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_{}_attentions_0_proj_in"
    state = {f"{name.format(0)}.hada_w1_a": torch.ones(2, 4), f"{name.format(0)}.hada_w1_b": torch.ones(4, 2)}
    state |= {f"{name.format(0)}.alpha": torch.tensor(3.0), f"{name.format(1)}.lokr_w1": torch.ones(2, 2)}
    state |= {f"{name.format(1)}.lokr_w2": torch.ones(2, 2), f"{name.format(1)}.alpha": torch.tensor(1.0)}
    state |= {f"{name.format(2)}.oft_blocks": torch.ones(2, 2, 2), f"{name.format(2)}.alpha": torch.tensor(0.1)}
    state |= {f"{name.format(3)}.diff": torch.ones(2, 2)}
    save_file(state, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x")
    assert found.format == "lycoris"
    assert [(b.name, b.method, b.ranks, b.alphas) for b in found.blocks] == [
        ("lora_unet_down_blocks_0", "loha", (4,), (3.0,)),
        ("lora_unet_down_blocks_1", "lokr", (), ()),  # of two full factors, where alpha does not count
        ("lora_unet_down_blocks_2", "oft", (), ()),  # whose alpha is a constraint
        ("lora_unet_down_blocks_3", "full weights", (), ()),
    ]


def test_token_embeddings_and_unknown_formats(tmp_path: Path) -> None:
    words = fill(attach(tiny_pipeline("sd"), "textual_inversion", tokens="<toy>", vectors=2))
    (row,) = inspect(embeddings.save(words, tmp_path / "words")).blocks
    assert (row.name, row.method, row.values) == ("<toy>", "textual_inversion", 48)
    save_file({"a.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x", tiny_pipeline("sd"))
    assert (found.format, found.fits, found.blocks) == (None, None, ())


def test_the_command_prints_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "kohya.safetensors"), "--base", str(folder / "base")]) == 0
    printed = capsys.readouterr().out
    assert "format: kohya" in printed
    assert "2–4" in printed
    assert "on this base: compatible" in printed
    assert main(["inspect", str(folder / "kohya.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "kohya"
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(LoadError):
        inspect(tmp_path / "nowhere")
