"""Loading and saving a file takes time linear in its number of layers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from veneer.formats import formats, known_format, native, read
from veneer.formats._core.format import Format
from veneer.formats._io.reader import File
from veneer.injection import attach
from veneer.injection.select import select
from veneer.injection.sites import WeightSite
from veneer.testing.pipelines import tiny_pipeline

FEW, MANY = 500, 2_000
MOST = 9.0  # times as long for four times as many layers: 4 if linear, 16 if quadratic
PAIR = ("lora_down.weight", "lora_up.weight", "alpha")
NAMES = {
    "kohya": ("lora_unet_single_blocks_{}_linear2", PAIR),
    "comfyui": ("diffusion_model.single_blocks.{}.linear2", PAIR),
    "onetrainer": ("lora_transformer_single_transformer_blocks_{}_proj_out", PAIR),
    "diffusers": ("transformer.single_transformer_blocks.{}.proj_out", ("lora_A.weight", "lora_B.weight")),
    "peft_folder": ("base_model.model.single_transformer_blocks.{}.proj_out", ("lora_A.weight", "lora_B.weight")),
    "lycoris": ("lora_unet_single_blocks_{}_linear2", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
}  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def assert_linear(work: Callable[[int], Callable[[], Any]]) -> None:
    """The shorter of two measurements: other work on the machine can only make one longer."""
    few, many = work(FEW), work(MANY)
    ratio = min(seconds(many) for _ in range(2)) / min(seconds(few) for _ in range(2))
    assert ratio < MOST


def large(form: str, layers: int, folder: Path) -> tuple[File, Format]:
    """A file with two layers that the tiny FLUX has, and thousands that it does not have."""
    pipe = tiny_pipeline("flux")
    method = "loha" if form == "lycoris" else "lora"
    path = formats.get(form)().save(attach(pipe, method, where="single.out", rank=1), folder / str(layers))
    name, ends = NAMES[form]
    more: dict[str, Tensor] = {f"{name.format(i + 9)}.{end}": torch.ones(1, 1) for i in range(layers) for end in ends}
    save_file(load_file(path) | more, path)
    file = read(path)
    return file, known_format(file)


@pytest.mark.parametrize("form", NAMES)
def test_listing_the_layers_of_a_file(form: str, tmp_path: Path) -> None:
    def work(layers: int) -> Callable[[], Any]:
        file, known = large(form, layers, tmp_path)
        assert known.name == form
        assert len(known.layers(file)) >= layers
        return lambda: known.layers(file)

    assert_linear(work)


@pytest.mark.parametrize("form", NAMES)
def test_loading_a_file_of_many_unknown_layers(form: str, tmp_path: Path) -> None:
    def work(layers: int) -> Callable[[], Any]:
        file, _ = large(form, layers, tmp_path)
        pipe = tiny_pipeline("flux")

        def load() -> None:
            loaded = veneer.load(pipe, file.path, strict=False)
            assert len(loaded.loaded.unused) == layers * len(NAMES[form][1])
            loaded.detach()

        return load

    assert_linear(work)


def test_listing_the_sites_of_a_native_file(tmp_path: Path) -> None:
    def work(layers: int) -> Callable[[], Any]:
        path = native.save(attach(tiny_pipeline("flux"), "lora", where="single.out", rank=1), tmp_path / str(layers))
        metadata = json.loads(read(path).metadata["veneer"])
        sites = [f"transformer.single_transformer_blocks.{i}.proj_out" for i in range(layers)]
        metadata["attachments"][0]["sites"] = sites
        tensors = {f"{site}:{half}": torch.ones(1, 1) for site in sites for half in ("down", "up")}
        save_file(tensors, path, {"veneer": json.dumps(metadata)})
        file = read(path)
        return lambda: native.Native().layers(file)

    assert_linear(work)


def test_selecting_sites_by_name() -> None:
    """As every load does."""

    def work(layers: int) -> Callable[[], Any]:
        sites = [WeightSite(name=f"blocks.{i}.fc", role="fc", path=f"blocks.{i}.fc", d_out=1, d_in=1) for i in range(layers)]
        names = [f"name:{s.name}" for s in sites]
        assert select(sites, names, frozenset([""])) == sites
        return lambda: select(sites, names, frozenset([""]))

    assert_linear(work)
