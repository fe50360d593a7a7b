"""Token embeddings in images, as A1111's web UI saves them, and pickles, which are rejected with a conversion command."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import veneer
from tests.raising import raises
from veneer.formats import inspect
from veneer.formats._io.image_embeddings import mask_series
from veneer.injection import LoadError
from veneer.testing.pipelines import tiny_pipeline

ROWS = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))


def told(tensors: dict[str, Tensor] | None = None, **more: Any) -> dict[str, Any]:
    """A1111's dictionary of an embedding."""
    word = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": {"TORCHTENSOR": ROWS.tolist()}},
        "name": "my-cat",
        "step": 500,
    }
    return {k: {"TORCHTENSOR": t.tolist()} for k, t in tensors.items()} if tensors else {**word, **more}


def with_chunk(path: Path, data: Any, packed: bool = False) -> Path:
    info = PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(data).encode()).decode(), zip=packed)
    Image.new("RGB", (8, 8), (200, 30, 30)).save(path, pnginfo=info)
    return path


def hidden(values: np.ndarray) -> np.ndarray:
    """Exclusive or with the low bits of the series, element by element."""
    seed, found = 0, []
    for value in values.reshape(-1).tolist():
        seed = (1664525 * seed + 1013904223) % 2**32
        found.append(value ^ (seed % 255 & 0x0F))
    return np.array(found, np.uint8).reshape(values.shape)


def with_edges(path: Path, data: Any, style: int = 0x50, **options: Any) -> Path:
    """The older form: the text in the low bits of two edges beside an image, and visible content in the high bits."""
    height = 64
    raw = np.frombuffer(zlib.compress(json.dumps(data).encode(), 9), np.uint8)
    width = -(-len(raw) // (3 * height)) + 1
    filled = np.resize(raw, height * width * 3).reshape(height, width, 3)
    low, high = (hidden(half) | style for half in (filled & 0x0F, filled >> 4))
    black, middle = np.zeros((height, 1, 3), np.uint8), np.full((height, 40, 3), 77, np.uint8)
    Image.fromarray(np.concatenate([low, black, middle, black, high], 1)).save(path, **options)
    return path


@pytest.mark.parametrize("make", [with_chunk, with_edges])
def test_a_token_embedding_in_an_image_is_loaded(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "cat.png", told())
    pipe = tiny_pipeline("sd")
    loaded = veneer.load(pipe, path)
    assert (loaded.method.each, loaded.method.vectors) == (("my-cat",), 3)
    assert torch.equal(next(iter(loaded.state_dict().values())), ROWS)
    assert "my-cat" in pipe.tokenizer.get_vocab()
    assert inspect(path).format == "embeddings"


def test_packed_chunks_and_webp(tmp_path: Path) -> None:
    for path in (
        with_chunk(tmp_path / "a.png", told(), packed=True),
        with_edges(tmp_path / "b.webp", told(), lossless=True, exact=True),
    ):
        assert torch.equal(next(iter(veneer.load(tiny_pipeline("sd"), path).state_dict().values())), ROWS)


def test_the_token_is_the_callers_or_the_name_of_the_file(tmp_path: Path) -> None:
    path = with_chunk(tmp_path / "Cat.png", told(name=None))
    assert veneer.load(tiny_pipeline("sd"), path).method.each == ("<cat>",)
    named = with_chunk(tmp_path / "named.png", told(name="My-Cat"))
    assert veneer.load(tiny_pipeline("sd"), named).method.each == ("my-cat",)
    assert veneer.load(tiny_pipeline("sd"), path, token="<toy>").method.each == ("<toy>",)


def test_of_two_text_encoders(tmp_path: Path) -> None:
    rows = {"clip_l": torch.ones(2, 24), "clip_g": torch.full((2, 28), 2.0)}
    loaded = veneer.load(tiny_pipeline("sdxl"), with_chunk(tmp_path / "x.png", told(rows)), token="<toy>")
    assert [t.shape for t in loaded.state_dict().values()] == [(2, 24), (2, 28)]


def test_the_series() -> None:
    """The numbers that the web UI's own module asserts."""
    assert mask_series(20).tolist() == [253, 242, 127, 44, 157, 27, 239, 133, 38, 79, 167, 4, 177, 95, 130, 79, 78, 14, 52, 215]
    assert int(mask_series(100_100)[100:].sum(dtype=np.int64)) == 12731374


BOMB = zlib.compress(b" " * 70_000_000)


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda path: Image.new("RGB", (8, 8), (9, 9, 9)).save(path), {"missing": ("sd-ti-embedding",)}),
        (lambda path: Image.new("RGB", (8, 8)).save(path), {"missing": ("sd-ti-embedding",)}),
        (lambda path: with_chunk(path, {}), {"missing": ("string_to_param", "clip_l", "clip_g")}),
        (lambda path: with_chunk(path, [1]), {"given": "list", "expected": "JSON object"}),
        (
            lambda path: with_chunk(path, told(string_to_param={"*": {"TORCHTENSOR": [[1], [1, 2]]}})),
            {"given": (1, 2), "expected": "matrix"},
        ),
        (
            lambda path: with_chunk(path, told(string_to_param={"*": {"TORCHTENSOR": [["1"]]}})),
            {"given": "str", "expected": "number"},
        ),
        (lambda path: with_chunk(path, told(string_to_param={"*": 3})), {"given": "int", "expected": "vectors"}),
        (
            lambda path: with_chunk(path, told(string_to_param={"*": {"TORCHTENSOR": [[1.0] * 7]}})),
            {"given": 7, "expected": {"text_encoder": 24}},
        ),
        (lambda path: with_edges(path, {"no": "word"}), {"missing": ("string_to_param", "clip_l", "clip_g")}),
        (lambda path: (with_chunk(path, told()), path.write_bytes(path.read_bytes()[:600])), {"given": 600}),
        (lambda path: packed(path, BOMB), {"given": 6_000_000, "expected": 6_000_000}),
        (lambda path: packed(path, BOMB[:-9]), {"expected": 6_000_000}),
    ],
    ids=["none", "black", "empty", "list", "ragged", "text", "number", "width", "edges", "short", "bomb", "ends"],
)
def test_malformed_images(tmp_path: Path, make: Any, data: dict[str, Any]) -> None:
    make(tmp_path / "x.png")
    pipe = tiny_pipeline("sd")
    with raises(LoadError, file=str(tmp_path / "x.png"), **data):
        veneer.load(pipe, tmp_path / "x.png")
    assert veneer.attachments(pipe) == []


def packed(path: Path, data: bytes) -> None:
    """An image with these bytes as its packed chunk."""
    Image.new("RGB", (8, 8), (9, 9, 9)).save(path)
    raw = path.read_bytes()
    chunk = b"zTXt" + b"sd-ti-embedding\0\0" + data
    framed = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    path.write_bytes(raw[:33] + framed + raw[33:])


# pickles


def command(error: str, number: int) -> list[str]:
    """The command in an error, as a shell reads it."""
    commands = re.findall(r'python -c "[^"]*"', error.replace("\\\n", ""))
    return [sys.executable, *shlex.split(commands[number])[1:]]


@pytest.mark.parametrize("kind", ["a1111", "ldm", "diffusers", "lora"])
def test_the_command_in_the_error_converts_a_pickle(tmp_path: Path, kind: str) -> None:
    old = tmp_path / ("old.bin" if kind == "diffusers" else "old.pt")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    content: dict[str, Any] = {
        "a1111": {"string_to_token": {"*": 265}, "string_to_param": {"*": ROWS}, "name": "my-cat", "step": 1},
        "ldm": {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": ROWS.clone()})},
        "diffusers": {"<cat>": ROWS},
        "lora": {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(16, 2)},
    }
    torch.save(content[kind], old)
    with raises(LoadError, file=str(old), given="zip") as error:
        veneer.load(tiny_pipeline("sd"), old)
    subprocess.run(command(str(error.value), 0 if kind == "lora" else 1), check=True, capture_output=True)
    loaded = veneer.load(tiny_pipeline("sd"), tmp_path / "old.safetensors")
    if kind == "lora":
        assert len(loaded.parts) == 1
    else:
        assert torch.equal(next(iter(loaded.state_dict().values())), ROWS)
        assert loaded.method.each == ({"a1111": "my-cat", "ldm": "<old>", "diffusers": "<cat>"}[kind],)
