"""Token embeddings for diffusers and other tools: they load them without veneer, and generate the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats.cases import fill, header
from tests.raising import raises
from veneer.formats import embeddings
from veneer.injection import LoadError, SaveError, attach, hosts
from veneer.testing.pipelines import tiny_pipeline

FIXTURE = Path(__file__).resolve().parents[3] / "shared" / "data" / "fixtures" / "embedding_emb_params.safetensors"
PROMPT = "a photo of <toy> on the beach"


def picture(pipe: Any, prompt: str = PROMPT) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt, num_inference_steps=2, guidance_scale=4.0, generator=generator, output_type="pt").images


def words(pipe: Any, **config: Any) -> veneer.Attachment:
    return fill(attach(pipe, "textual_inversion", **{"tokens": "<toy>", "initialize": "toy", **config}), std=1.0)


def by_diffusers(pipe: Any, path: Path, token: str) -> None:
    """SD: the file itself. SDXL: each tensor to its encoder, as in the documentation of diffusers."""
    tensors = load_file(path)
    if not hasattr(pipe, "text_encoder_2"):
        pipe.load_textual_inversion(path)
        return
    pipe.load_textual_inversion(tensors["clip_l"], token=token, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(tensors["clip_g"], token=token, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_diffusers_alone_generates_the_same_images(tmp_path: Path, family: str, vectors: int) -> None:
    """`load_textual_inversion` on a pipeline that veneer has never seen: pixels in 0 to 1, float32."""
    pipe = tiny_pipeline(family)
    tuned = words(pipe, vectors=vectors)
    image = picture(pipe)
    path = embeddings.save(tuned, tmp_path)
    assert path.name == "learned_embeds.safetensors"
    plain = tiny_pipeline(family)
    by_diffusers(plain, path, "<toy>")
    assert (picture(plain) - image).abs().max() <= 1e-4
    assert (picture(pipe, "a photo of toy on the beach") - image).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_read_back_it_is_the_same(tmp_path: Path, family: str) -> None:
    tuned = words(tiny_pipeline(family), tokens=("<toy>", "<cat-toy>"), vectors=2)
    path = embeddings.save(tuned, tmp_path / "toy")
    pipe = tiny_pipeline(family)
    loaded = veneer.load(pipe, path)
    assert loaded.method.each == ("<toy>", "<cat-toy>")
    assert loaded.method.vectors == 2
    state = loaded.state_dict()
    assert state.keys() == tuned.state_dict().keys()
    assert all(torch.equal(state[k], t) for k, t in tuned.state_dict().items())
    assert embeddings.save(loaded, tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("tokens", [["a:b"], ["<toy:1>", "cat.weight"]])
def test_tokens_with_any_characters_are_read_back(tmp_path: Path, tokens: list[str]) -> None:
    attachment = words(tiny_pipeline("sd"), tokens=tokens)
    path = embeddings.save(attachment, tmp_path)
    loaded = veneer.load(tiny_pipeline("sd"), path)
    assert list(loaded.method.each) == tokens
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), attachment.state_dict().values(), strict=True))


def test_names_in_the_file(tmp_path: Path) -> None:
    one = embeddings.save(words(tiny_pipeline("sd"), vectors=2), tmp_path / "one")
    assert {k: v["shape"] for k, v in header(one).items() if k != "__metadata__"} == {"<toy>": [2, 24]}
    two = header(embeddings.save(words(tiny_pipeline("sdxl")), tmp_path / "two"))
    assert json.loads(two.pop("__metadata__")["tokens"]) == ["<toy>"]
    assert {k: v["shape"] for k, v in two.items()} == {"clip_l": [1, 24], "clip_g": [1, 28]}
    flux = load_file(embeddings.save(words(tiny_pipeline("flux")), tmp_path / "flux"))
    assert {k: tuple(t.shape) for k, t in flux.items()} == {"clip_l": (1, 28), "t5": (1, 60)}


def test_a_file_of_another_tool_without_a_token(tmp_path: Path) -> None:
    """sd-scripts' `emb_params`: five vectors, the token from the file's name or from the caller."""
    rows = torch.randn(5, 24)
    save_file({"emb_params": rows}, tmp_path / "My-Cat.safetensors")
    pipe = tiny_pipeline("sd")
    loaded = veneer.load(pipe, tmp_path / "My-Cat.safetensors")
    assert loaded.method.each == ("<my-cat>",)
    assert "no token in the file: named '<my-cat>'" in str(loaded.loaded)
    assert torch.equal(next(iter(loaded.state_dict().values())), rows)
    plain = tiny_pipeline("sd")
    plain.load_textual_inversion({"emb_params": rows}, token="<my-cat>")
    prompt = "a photo of <my-cat> on the beach"
    assert (picture(plain, prompt) - picture(pipe, prompt)).abs().max() <= 1e-4
    assert veneer.load(tiny_pipeline("sd"), tmp_path / "My-Cat", token="<kitty>").method.each == ("<kitty>",)


@pytest.mark.skipif(not FIXTURE.is_file(), reason="the published embedding is not on this machine")
def test_a_published_embedding_fits_clip_of_its_width() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    pipe = tiny_pipeline("sd")
    config = pipe.text_encoder.config.to_dict()
    wide = CLIPTextModel(CLIPTextConfig(**{**config, "hidden_size": 768, "intermediate_size": 8, "num_hidden_layers": 1}))
    loaded = veneer.load(Encoder(pipe.tokenizer, wide), FIXTURE, token="<style>")
    (rows,) = loaded.state_dict().values()
    assert torch.equal(rows, load_file(FIXTURE)["emb_params"])
    assert loaded.method.vectors == 5
    with raises(LoadError, given=768, expected={"text_encoder": 24}):
        veneer.load(pipe, FIXTURE)


class Encoder:
    """A pipeline of a tokenizer and a text encoder."""

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        self.components = {"tokenizer": tokenizer, "text_encoder": text_encoder}


def test_a_single_vector_without_a_dimension_for_it(tmp_path: Path) -> None:
    row = torch.randn(24)
    save_file({"<one>": row}, tmp_path / "x.safetensors")
    loaded = veneer.load(tiny_pipeline("sd"), tmp_path / "x")
    assert loaded.method.each == ("<one>",)
    assert torch.equal(next(iter(loaded.state_dict().values())), row[None])


@pytest.mark.parametrize(
    ("tensors", "data"),
    [
        ({"<a>": torch.ones(1, 25)}, {"given": 25, "expected": {"text_encoder": 24}}),
        (
            {"clip_l": torch.ones(1, 24), "clip_g": torch.ones(1, 28)},
            {"given": ("clip_g",), "expected": {"text_encoder": 24}},
        ),
        ({"clip_l": torch.ones(1, 25)}, {"where": "text_encoder", "given": 25, "expected": 24}),
        ({"t5": torch.ones(1, 24)}, {"given": ("t5",), "expected": {"text_encoder": 24}}),
        ({"<a>": torch.ones(1, 24), "<b>": torch.ones(2, 24)}, {"given": {"<a>": 1, "<b>": 2}}),
        ({"emb_params": torch.ones(1, 24), "clip_l": torch.ones(1, 24)}, {"where": "emb_params", "given": ("clip_l",)}),
        ({"<a>": torch.ones(0, 24)}, {"given": 0, "expected": 1}),
        ({"toy": torch.ones(1, 24)}, {"option": "tokens", "given": "toy"}),
        ({"<a>": torch.full((1, 24), float("nan"))}, {"given": ("<a>",), "expected": "finite"}),
    ],
    ids=lambda value: "+".join(value),
)
def test_embeddings_that_do_not_fit(tmp_path: Path, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    pipe = tiny_pipeline("sd")
    size = len(pipe.tokenizer)
    with raises(LoadError, **data):
        veneer.load(pipe, tmp_path / "x")
    assert veneer.attachments(pipe) == []
    assert len(pipe.tokenizer) == size


def test_a_model_without_text(tmp_path: Path) -> None:
    save_file({"<a>": torch.ones(1, 24)}, tmp_path / "x.safetensors")
    with raises(LoadError, given=24, expected={}):
        veneer.load(tiny_pipeline("dit"), tmp_path / "x")


def test_a_bare_text_encoder_has_no_tokenizer(tmp_path: Path) -> None:
    save_file({"<a>": torch.ones(1, 16)}, tmp_path / "x.safetensors")
    with raises(LoadError, option="ids", expected="tokenizer"):
        veneer.load(hosts.get("clip_text")().tiny()["clip"](), tmp_path / "x")


def test_only_embeddings_are_written(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    lora = attach(pipe, "lora", rank=2)
    for given, names in (([], ()), (lora, ("lora",)), ([words(pipe), lora], ("textual_inversion", "lora"))):
        with raises(SaveError, given=names, expected=("textual_inversion",)):
            embeddings.save(given, tmp_path / "x")
    with raises(SaveError, where="textual_inversion") as caught:
        embeddings.save(words(tiny_pipeline("sd"), train="text/norm"), tmp_path / "x")
    assert all(key.startswith("text_encoder.") for key in caught.value.given)
    assert list(tmp_path.iterdir()) == []
