"""The search for a prompt against algorithm 1 of PEZ, written out with one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from veneer.pipelines.personalize import PersonalizeConfig, personalize

from tests.raising import raises
from veneer.base_models.clip_features import BaseClip, load_clip
from veneer.injection.errors import OptionError
from veneer.prompt_search import SearchOptions, search_prompt

WORDS = [f"w{i}" for i in range(1, 40)]
START, END, LENGTH = 40, 41, 12


class Words:
    """A tokenizer of the words `w1` … `w39`, with their numbers as ids."""

    def __call__(self, texts: Sequence[str], context_length: int = LENGTH) -> Tensor:
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = [START, *(int(w[1:]) if w in WORDS else 1 for w in text.split())][: context_length - 1]
            row[: len(ids) + 1] = torch.tensor([*ids, END])
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{i}" for i in ids if i)


def tiny() -> BaseClip:
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8}
    text = {"context_length": LENGTH, "vocab_size": END + 1, "width": 8, "heads": 1, "layers": 1}
    model = open_clip.model.CLIP(embed_dim=6, vision_cfg=vision, text_cfg=text).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return BaseClip(model.eval(), pixels, Words())


def pixels(image: Image.Image) -> Tensor:
    return torch.tensor(list(image.resize((16, 16)).tobytes()), dtype=torch.float64).view(16, 16, 3).permute(2, 0, 1) / 255


def photos() -> list[Image.Image]:
    return [Image.linear_gradient("L").convert("RGB"), Image.new("RGB", (20, 20), "red")]


def prompt_features(model: Any, ids: Sequence[int], rows: Tensor) -> Tensor:
    """Features of [start] rows [end] 0 …, through the model's own blocks."""
    table = model.token_embedding.weight
    end = 1 + len(ids)
    x = (
        torch.cat([table[START][None], rows, table[END][None], table[0].expand(LENGTH - end - 1, -1)])
        + model.positional_embedding
    )
    x = model.ln_final(model.transformer(x[None], attn_mask=model.attn_mask))[0, end] @ model.text_projection
    return x / x.norm()


def test_search_is_algorithm_1() -> None:
    clip, steps = tiny(), 12
    model = clip.model.requires_grad_(False)
    table = model.token_embedding.weight
    targets = normalize(model.encode_image(torch.stack([pixels(p) for p in photos()])), dim=-1)
    p = table[[3, 7, 9]].float().requires_grad_()
    optimizer = torch.optim.AdamW([p], lr=0.3, weight_decay=0.05)
    scores: dict[str, float] = {}
    for step in range(steps + 1):
        cosines = torch.stack([torch.cosine_similarity(v.double()[None], table) for v in p.detach()])
        cosines[:, [START, END]] = -2
        ids = cosines.argmax(1).tolist()
        scores[clip.tokenizer.decode(ids)] = float((targets @ model_text(clip, ids)).mean())
        if step < steps:
            rows = table[ids].requires_grad_()
            loss = 1 - (targets @ prompt_features(model, ids, rows)).mean()
            p.grad = torch.autograd.grad(loss, rows)[0].float()
            optimizer.step()
    options = SearchOptions(words="w3 w7 w9", steps=steps, learning_rate=0.3, weight_decay=0.05, batch=2)
    match = search_prompt(clip, photos(), options)
    assert len(scores) > 3
    assert match.text == max(scores, key=scores.__getitem__)
    assert match.similarity == pytest.approx(scores[match.text])


def model_text(clip: BaseClip, ids: Sequence[int]) -> Tensor:
    return normalize(clip.encode_text(clip.tokenizer([clip.tokenizer.decode(ids)])), dim=-1)[0]


def test_the_seed_decides_tokens_and_photos() -> None:
    options = {"tokens": 3, "steps": 4}
    first, again, other = (search_prompt(tiny(), photos(), SearchOptions(**options, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.text != other.text
    assert len(first.text.split()) == 3


def test_incompatible_arguments_are_named(tmp_path: Path) -> None:
    with raises(OptionError, option="tokens", given=11, expected=10):
        search_prompt(tiny(), photos(), SearchOptions(tokens=11))
    clip = tiny()
    clip.tokenizer.__class__ = type("NoTexts", (Words,), {"decode": lambda self, ids: ""})
    with raises(OptionError, option="features", given="CLIP"):
        search_prompt(clip, photos(), SearchOptions())
    for options in ({"resume": True}, {"dry_run": True}, {"options": {"pez": {"position": "front"}}}):
        with raises(OptionError, option=next(iter(options)) if "options" not in options else "position"):
            personalize(PersonalizeConfig(method="pez", out=tmp_path / "run", **options))
    with raises(OptionError, option="features", given="timm:resnet18"):
        personalize(PersonalizeConfig(method="pez", out=tmp_path / "run", features="timm:resnet18"))


@pytest.mark.parametrize(
    "option",
    [
        *({"steps": 0}, {"steps": -3}, {"batch": 0}, {"learning_rate": 0.0}, {"weight_decay": -0.1}),
        *({"ema": 0.9}, {"resolution": 64}, {"concept": "<toy>"}, {"quantize": ("int8",)}, {"where": ("attn",)}),
    ],
)
def test_options_out_of_range_or_without_effect(option: dict[str, Any], tmp_path: Path) -> None:
    ((name, given),) = option.items()
    with raises(OptionError, method="pez", option=name, given=given):
        personalize(PersonalizeConfig(method="pez", out=tmp_path / "run", **option))
    assert not (tmp_path / "run").exists()


def test_personalize_prints_a_prompt_that_names_the_bundled_subject(tmp_path: Path, capsys: Any) -> None:
    """From words that describe another image the search finds a prompt that is more similar to the photos."""
    out = personalize(
        PersonalizeConfig(method="pez", out=tmp_path / "run", steps=25, options={"pez": {"words": "a photo of a red car"}})
    )
    text = (out / "prompt.txt").read_text().strip()
    assert f"prompt: {text}" in capsys.readouterr().out
    clip = load_clip()
    from veneer import base_models
    from veneer.training.data.photo_folder import find_photos

    images = [clip.preprocess(Image.open(photo.path).convert("RGB")) for photo in find_photos(base_models.examples())]
    with torch.no_grad():
        photo = normalize(clip.encode_image(torch.stack(images)), dim=-1)
        found, before = normalize(clip.encode_text(clip.tokenizer([text, "a photo of a red car"])), dim=-1)
    assert (photo @ found).mean() > (photo @ before).mean() + 0.1
