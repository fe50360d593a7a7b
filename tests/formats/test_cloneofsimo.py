"""LoRA and tokens of cloneofsimo/lora: layers by number, in the order in which the model of its time registered them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.formats.cases import deltas
from tests.hosts import published
from tests.raising import raises
from veneer.formats import cloneofsimo, read
from veneer.injection import LoadError, SaveError, attach
from veneer.injection.towers import towers_of
from veneer.testing.pipelines import tiny_pipeline

FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "data" / "fixtures" / "lora_disney.safetensors"
DEFAULT = ["CrossAttention", "Attention", "GEGLU"]
LAYERS = 36  # of these classes in the tiny UNet


class Parts:
    """A pipeline of these parts."""

    def __init__(self, **parts: Any) -> None:
        self.components = parts


@pytest.mark.skipif(not FIXTURE.is_file(), reason="the published LoRA is not on this machine")
def test_a_published_file_on_the_shapes_of_sd_1_5() -> None:
    """144 layers of the UNet, 48 of the text encoder, both tokens; nothing unused."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_pipeline("sd").tokenizer
    config = {**published.CLIP_L, "vocab_size": len(tokenizer), "intermediate_size": 8}
    pipe = Parts(unet=published.build("sd15"), text_encoder=CLIPTextModel(CLIPTextConfig(**config)), tokenizer=tokenizer)
    words, lora = veneer.load_all(pipe, FIXTURE)
    assert words.method.each == ("<s1>", "<s2>")
    assert [site.component for site, _ in lora.parts.values()].count("unet") == 144
    assert len(lora.parts) == 192
    assert len(words.loaded.used) + len(lora.loaded.used) == 385  # two tokens in one tensor
    assert words.loaded.clean
    assert lora.loaded.clean
    tensors = load_file(FIXTURE)
    assert torch.equal(next(iter(words.state_dict().values())), torch.stack([tensors["<s1>"], tensors["<s2>"]]))
    state = lora.state_dict()
    layers = [
        k.rpartition(":")[0] for k in state if k.startswith("text_encoder") and k.endswith("layers.3.self_attn.k_proj:down")
    ]
    assert torch.equal(state[f"{layers[0]}:up"], tensors["text_encoder:12:up"])


@pytest.mark.skipif(not FIXTURE.is_file(), reason="the published LoRA is not on this machine")
def test_places_in_the_published_file() -> None:
    (tower,) = towers_of(published.build("sd15"))
    names = [site.name for site in cloneofsimo._order(read(FIXTURE), "unet", tower)]
    assert names[4] == "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
    assert names[6] == "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert names[54] == "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names[143] == "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"


def registered(model: nn.Module, classes: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions inside modules of these classes, in the order of registration."""
    for outer, module in model.named_modules():
        if type(module).__name__ in classes:
            for inner, layer in module.named_modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    yield f"{outer}.{inner}", layer


def as_before(unet: nn.Module) -> None:
    """The order that diffusers had until 0.16: the feed-forward between the attentions."""
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            parts = module._modules
            order = ["attn1", "ff", "attn2"]
            module._modules = {**{k: parts[k] for k in order}, **{k: m for k, m in parts.items() if k not in order}}


def made(path: Path, pipe: Any, classes: list[str], rank: int = 2, tokens: int = 0) -> dict[str, Tensor]:
    """A file for a pipeline as its own modules are registered, and ΔW = B A of every site."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {f"<s{i}>": torch.randn(24, generator=generator) for i in range(tokens)}
    metadata = dict.fromkeys(tensors, "<embed>")
    want = {}
    for component, inside in (("unet", classes), ("text_encoder", ["CLIPAttention"])):
        metadata[component] = json.dumps(inside)
        for i, (name, layer) in enumerate(registered(pipe.components[component], inside)):
            weight: Any = layer.weight
            ones = (1,) * (weight.ndim - 2)
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], rank, *ones, generator=generator)
            tensors |= {f"{component}:{i}:down": down, f"{component}:{i}:up": up}
            metadata[f"{component}:{i}:rank"] = str(rank)
            change = up.double().flatten(1) @ down.double().flatten(1)
            want[f"{component}.{name}"] = change.reshape(weight.shape)
    save_file(tensors, path, metadata)
    return want


@pytest.mark.parametrize("classes", [DEFAULT, [*DEFAULT, "ResnetBlock2D"]], ids=["default", "extended"])
@pytest.mark.parametrize("change", [None, as_before], ids=["new", "old"])
def test_every_layer_gets_its_own_change(tmp_path: Path, classes: list[str], change: Any) -> None:
    pipe = tiny_pipeline("sd")
    if change:
        change(pipe.unet)
    want = made(tmp_path / "x.safetensors", pipe, classes)
    loaded = veneer.load(tiny_pipeline("sd"), tmp_path / "x")
    got = deltas(loaded)
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[name], delta, rtol=1e-6, atol=1e-9) for name, delta in want.items())


def test_tokens_come_with_it(tmp_path: Path) -> None:
    made(tmp_path / "x.safetensors", tiny_pipeline("sd"), DEFAULT, tokens=1)
    pipe = tiny_pipeline("sd")
    words, lora = veneer.load_all(pipe, tmp_path / "x", token="<toy>", name="toy")
    assert words.method.each == ("<toy>",)
    assert (words.name, lora.name) == ("toy-textual_inversion", "toy-lora")
    assert torch.equal(next(iter(words.state_dict().values()))[0], load_file(tmp_path / "x.safetensors")["<s0>"])
    assert "<toy>" in pipe.tokenizer.get_vocab()


def test_a_bare_unet_takes_its_part(tmp_path: Path) -> None:
    want = made(tmp_path / "x.safetensors", tiny_pipeline("sd"), DEFAULT)
    unet = tiny_pipeline("sd").unet
    with pytest.raises(LoadError) as caught:
        veneer.load(unet, tmp_path / "x")
    assert caught.value.unused[0] == "text_encoder:0:down"
    assert len(caught.value.unused) == 24
    loaded = veneer.load(unet, tmp_path / "x", strict=False)
    assert {f"unet.{name}" for name in loaded.parts} == {name for name in want if name.startswith("unet")}
    assert len(loaded.loaded.unused) == 24


@pytest.mark.parametrize(
    ("change", "data"),
    [
        (lambda t, m: t.pop("unet:3:up"), {"where": "unet", "given": LAYERS, "expected": LAYERS}),
        (
            lambda t, m: (t.pop("unet:3:up"), t.pop("unet:3:down")),
            {"where": "unet", "given": LAYERS - 1, "expected": LAYERS},
        ),
        (lambda t, m: t.update({"unet:3:up": torch.ones(16, 3)}), {"where": "unet", "expected": LAYERS}),
        (lambda t, m: t.update({"unet:0:down": torch.ones(2, 17)}), {"where": "unet", "expected": LAYERS}),
        (
            lambda t, m: t.update({"unet:99:down": torch.ones(2, 16), "unet:99:up": torch.ones(16, 2)}),
            {"where": "unet", "given": LAYERS + 1, "expected": LAYERS},
        ),
        (
            lambda t, m: m.update(unet='["Attention", "SpatialTransformer"]'),
            {"where": "unet", "given": ["Attention", "SpatialTransformer"]},
        ),
        (lambda t, m: m.update(unet="Attention"), {"where": "unet", "expected": "JSON"}),
        (lambda t, m: t.update({"<s0>": torch.ones(25)}), {"given": {"<s0>": (25,)}, "expected": 24}),
        (lambda t, m: m.pop("<s0>"), {"unused": ("<s0>",)}),
        (
            lambda t, m: t.update({"unet:0:down": torch.full((2, 16), float("nan"))}),
            {"given": ("unet:0:down",), "expected": "finite"},
        ),
    ],
    ids=["half", "gap", "ranks", "width", "more", "class", "json", "token", "flag", "nan"],
)
def test_files_that_do_not_fit(tmp_path: Path, change: Any, data: dict[str, Any]) -> None:
    made(tmp_path / "x.safetensors", tiny_pipeline("sd"), DEFAULT, tokens=1)
    tensors, metadata = load_file(tmp_path / "x.safetensors"), dict(read(tmp_path / "x.safetensors").metadata)
    change(tensors, metadata)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    pipe = tiny_pipeline("sd")
    with raises(LoadError, **data):
        veneer.load(pipe, tmp_path / "x")
    assert veneer.attachments(pipe) == []
    assert "<s0>" not in pipe.tokenizer.get_vocab()


def test_it_is_read_only(tmp_path: Path) -> None:
    with raises(SaveError, given="cloneofsimo", expected=("kohya", "diffusers", "native")):
        cloneofsimo.save(attach(tiny_pipeline("sd"), "lora", rank=2), tmp_path / "x")
