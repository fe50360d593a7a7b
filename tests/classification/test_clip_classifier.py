"""CLIP as a classifier: the logits against the equation, and the cache of class embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from tests.methods.classifiers import cosines, encode, pictures, row, tiny, token
from tests.raising import raises
from veneer.classification.data.transforms import EvalView
from veneer.classification.models.classifier import ModelError
from veneer.classification.models.loading import open_classifier
from veneer.classification.models.open_clip_loading import open_clip_classifier
from veneer.hosts.clip_classifier import LAST, small_tokenizer
from veneer.injection import attach
from veneer.injection.sites import FeatureSite, PromptSite
from veneer.injection.towers import sites
from veneer.models.clip_classifier import CLIPClassifier
from veneer.models.tokenizer import PromptTokenizer, TextError

NAMES = (("toy", "cat"), ("dog",), ("red", "car"))


def runs(model: nn.Module) -> list[int]:
    """A list that receives the number of prompts of each text tower pass. No hook is used, because hooks disable the cache."""
    seen: list[int] = []
    texts: Any = model.head.texts
    inner = texts.encode

    def encode(ids: Tensor, rows: Tensor | None = None) -> Tensor:
        seen.append(len(ids))
        return inner(ids, rows)

    texts.__dict__["encode"] = encode
    return seen


@pytest.mark.parametrize(("key", "side"), [("vit", 16), ("resnet", 64), ("timm", 160)])
def test_zero_shot(key: str, side: int) -> None:
    model, image = tiny(key), pictures(side)
    weights = []
    for name in NAMES:
        prompts = [["a", *name, "."], ["my", *name]]
        ids = [[62, *map(token, words), 63] for words in prompts]
        features = [encode(model.clip, row(model.clip, i), len(i) - 1) for i in ids]
        mean = (features[0] + features[1]) / 2
        weights.append(mean / mean.norm())
    torch.testing.assert_close(model(image), cosines(model, image, weights))


def test_logits_equal_open_clips() -> None:
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(
        16,
        {"image_size": 16, "patch_size": 8, "width": 24, "layers": 1, "head_width": 12},
        {"context_length": 20, "vocab_size": 64, "width": 20, "heads": 2, "layers": 1},
        init_logit_bias=-3.0,
    ).eval()
    model = CLIPClassifier(clip, small_tokenizer, ["cat", "dog"], ["a {}"])
    image = pictures().float()
    expected, _ = clip.get_logits(image, small_tokenizer(["a cat", "a dog"]))
    torch.testing.assert_close(model(image), expected)


def test_prompts_are_encoded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = tiny(), pictures()
    expected = model(image)
    monkeypatch.setattr("veneer.models.class_embeddings.PROMPTS", 4)
    torch.testing.assert_close(tiny()(image), expected)


def test_frozen_text_tower_runs_once() -> None:
    model, image = tiny().requires_grad_(False), pictures()
    seen = runs(model)
    expected = model(image)
    model(image)
    assert seen == [6]
    tuned = attach(model, "lora", where="vision/attn.q")
    model(image).sum().backward()
    assert seen == [6]
    assert all(p.grad is not None for p in tuned.parameters())
    tuned.detach()
    assert torch.equal(model(image), expected)
    assert seen == [6]


def fresh(model: Any, image: Tensor) -> Tensor:
    """Logits of a copy of the model with an empty cache."""
    again = copy.deepcopy(model)
    again.head.texts.clear_cache()
    with torch.no_grad():
        return again(image)


def check(model: Any, image: Tensor, before: Tensor, changed: bool = True) -> None:
    with torch.no_grad():
        got = model(image)
    assert torch.equal(got, fresh(model, image))
    assert torch.equal(got, before) is not changed


CHANGES: dict[str, Callable[[Any], Any]] = {
    "optimizer step": lambda m: m.clip.ln_final.bias.add_(0.5),
    "new data": lambda m: setattr(m.clip.ln_final.bias, "data", m.clip.ln_final.bias.data + 0.5),
    "new parameter": lambda m: setattr(m.clip, "text_projection", nn.Parameter(m.clip.text_projection + 0.5)),
    "load": lambda m: m.load_state_dict({k: v + 0.1 * v.norm() if v.dim() else v for k, v in m.state_dict().items()}),
    "load with assign": lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}, assign=True),
    "dtype": lambda m: m.float().double(),
    "new module": lambda m: setattr(m.clip, "ln_final", nn.LayerNorm(20, bias=False).double()),
    "hook": lambda m: m.clip.ln_final.register_forward_hook(lambda module, args, output: output * 1.5 + 0.1),
    "ids": lambda m: m.head.texts.ids.copy_(m.head.texts.ids.roll(1, 0)),
    "logit scale": lambda m: m.clip.logit_scale.mul_(0.5),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_cache_is_invalidated_by_every_change(change: str) -> None:
    model, image = tiny().requires_grad_(False), pictures()
    with torch.no_grad():
        before = model(image)
        CHANGES[change](model)
    check(model, image, before)


@pytest.mark.parametrize(("method", "where"), [("lora", "text/attn.v"), ("bitfit", "text/bias.*"), ("coop", "prompts")])
def test_cache_is_invalidated_by_attachments(method: str, where: str) -> None:
    """Logits are bitwise equal to uncached ones after every step, load, switch, merge and detach."""
    model, image = tiny().requires_grad_(False), pictures()
    options = {"tokens": 4} if method == "coop" else {}
    with torch.no_grad():
        before = model(image)
    tuned = attach(model, method, where=where, **options)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.3)
    check(model, image, before)
    with torch.no_grad():
        on = model(image)
        for p in tuned.parameters():
            p.data.mul_(0.5)  # does not change the tensor's version
    check(model, image, on)
    with torch.no_grad():
        half = model(image)
    tuned.load_state_dict({k: t * 2 for k, t in tuned.state_dict().items()})
    check(model, image, half)
    tuned.scale = 0.5
    check(model, image, on)
    with tuned.enabled(False):
        check(model, image, before, changed=False)
    if method != "coop":
        tuned.merge()
        check(model, image, before)
        tuned.unmerge()
        check(model, image, before)
    tuned.detach()
    check(model, image, before, changed=False)


def test_gradients_reach_the_text_tower() -> None:
    model, image = tiny(), pictures()
    model(image).sum().backward()
    assert model.clip.token_embedding.weight.grad.abs().sum() > 0
    frozen = tiny().requires_grad_(False)
    tuned = attach(frozen, "lora", where="text/attn.{q,v}")
    tuned.probe()


def test_cache_from_inference_mode_can_be_used_in_training() -> None:
    model, image = tiny().requires_grad_(False), pictures()
    with torch.inference_mode():
        expected = model(image).clone()
    tuned = attach(model, "clip_adapter")
    tuned.scale = 0.0
    assert torch.equal(model(image), expected)
    tuned.scale = 1.0
    model(image).sum().backward()
    tuned.detach()
    factor = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    model.head.texts.register_forward_hook(lambda module, args, weights: weights * factor)
    model(image).sum().backward()
    assert factor.grad is not None


def test_cache_depends_on_autocast() -> None:
    model, image = tiny().float().requires_grad_(False), pictures().float()
    plain = model(image)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(image)
        assert torch.equal(cast, fresh(model, image))
    assert torch.equal(model(image), plain)


def test_linear_head() -> None:
    model, image = tiny("linear"), pictures()
    torch.testing.assert_close(model(image), model.clip.visual(image) @ model.head.weight.T + model.head.bias)
    assert {s.tower for s in sites(model)} == {"vision"}
    assert not [s for s in sites(model) if isinstance(s, PromptSite)]
    tuned = attach(model, "bitfit", where="vision/bias.attn.v", train="head")
    assert {"head:weight", "head:bias"} <= set(dict(tuned.named_parameters()))


def test_feature_sites() -> None:
    for key in ("vit", "timm", "linear"):
        found = {s.role: s for s in sites(tiny(key)) if isinstance(s, FeatureSite)}
        assert found.keys() == {"features", "logits"}
        assert len([s for s in sites(tiny(key)) if isinstance(s, FeatureSite)]) == 2
        assert {(s.width, s.classes, s.head) for s in found.values()} == {(16, 3, "head")}


def test_no_prompt_site_without_end_token_pooling() -> None:
    text = {"context_length": 20, "vocab_size": 64, "width": 20, "heads": 2, "layers": 1, "pool_type": "last"}
    vision = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 1, "head_width": 12}
    model = CLIPClassifier(open_clip.model.CustomTextCLIP(16, vision, text), small_tokenizer, ["cat"])
    assert model(pictures().float()).shape == (2, 1)
    assert not [s for s in sites(model) if isinstance(s, PromptSite)]


@pytest.mark.parametrize("pad", [0, LAST], ids=["padding", "ends"])
def test_ids_are_those_of_the_tokenizer_up_to_the_context_length(pad: int) -> None:
    """With zeros after the end token, and with more end tokens."""

    def tokenizer(texts: list[str], context_length: int = 20) -> Tensor:
        ids = small_tokenizer(texts, context_length)
        return ids.masked_fill(ids == 0, pad)

    texts = ["long " * count for count in (0, 1, 17, 18)]
    own = PromptTokenizer(tokenizer, 20)
    assert torch.equal(own.ids(texts), tokenizer(texts))
    for count in (19, 300):
        with raises(TextError, where="tokens", expected=20):
            own.ids([*texts, "long " * count])


def test_error_lists_texts_that_are_too_long() -> None:
    clip = tiny().clip
    with raises(TextError, where="tokens", expected=20) as caught:
        CLIPClassifier(clip, small_tokenizer, ["cat", "very_long_" * 8])
    ((text, count),) = caught.value.given
    assert text.startswith("a photo of a very long ")
    assert count > 20
    CLIPClassifier(clip, small_tokenizer, ["long " * 18], ["{}"])  # exactly the context length
    with raises(TextError, where="tokens", expected=20):
        CLIPClassifier(clip, small_tokenizer, ["long " * 19], ["{}"])
    with raises(TextError, where="templates", given=("a photo",)):
        CLIPClassifier(clip, small_tokenizer, ["cat"], ["a photo"])


@pytest.mark.parametrize("key", ["vit", "timm"])
@pytest.mark.parametrize("method", ["lora", "bitfit", "ia3", "vpt", "adaptformer", "norm_tuning"])
def test_methods_adapt_both_towers(key: str, method: str) -> None:
    tuned = attach(tiny(key), method, sample=True)
    towers = {site.tower for site, _ in tuned.parts.values()}
    assert towers == ({"vision"} if method == "vpt" else {"vision", "text"})


def test_bundled_clip() -> None:
    found = open_classifier("bundled_clip", ["red_apple", "car", "cat"], templates=("{}",))
    clip, tokenizer = found.model.clip, open_clip.get_tokenizer("local-dir:" + str(_bundled()))
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, _ = clip.get_logits(image, tokenizer(["red apple", "car", "cat"]))
        torch.testing.assert_close(found.model(image), expected)
    assert found.classes == ("red_apple", "car", "cat")
    assert not found.fresh
    assert not found.model.training
    assert not any(p.requires_grad for p in found.model.parameters())
    assert found.features is not None
    assert found.features.width == 128


def test_data_config_matches_the_models_transform() -> None:
    from PIL import Image

    found = open_clip_classifier("bundled_clip", ["cat"])
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{_bundled()}")
    image = Image.effect_noise((90, 70), 80).convert("RGB")
    assert torch.equal(EvalView(found.data)(image), transform(image))


def _bundled() -> Any:
    from veneer import base_models

    return base_models.path("bundled_clip")


def test_weights(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    one, two, three = (open_clip_classifier("bundled_clip", ["cat"], weights="none", seed=s).model for s in (1, 1, 2))
    assert torch.equal(one.clip.visual.proj, two.clip.visual.proj)
    assert not torch.equal(one.clip.visual.proj, three.clip.visual.proj)
    save_file(one.clip.state_dict(), tmp_path / "w.safetensors")
    found = open_clip_classifier("bundled_clip", ["cat"], weights=tmp_path / "w.safetensors")
    assert torch.equal(found.model.clip.visual.proj, one.clip.visual.proj)
    assert len(found.weights) == 64
    save_file({"visual.proj": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with raises(ModelError, file=tmp_path / "other.safetensors", given="mismatch", expected="bundled_clip"):
        open_clip_classifier("bundled_clip", ["cat"], weights=tmp_path / "other.safetensors")
    linear = open_clip_classifier("bundled_clip", ["cat", "dog"], head="linear")
    assert linear.fresh
    assert linear.model.head.weight.shape == (2, 128)


@pytest.mark.parametrize(
    ("name", "weights", "data"),
    [
        ("open_clip:ViT-B-77/openai", None, {"where": "open_clip", "given": "ViT-B-77"}),
        ("open_clip:ViT-B-32/nothing", None, {"where": "ViT-B-32", "given": "nothing"}),
        ("open_clip:ViT-B-32", None, {"where": "ViT-B-32", "given": ""}),
        ("open_clip:ViT-B-32/openai", None, {"where": "quick_gelu", "given": "ViT-B-32"}),
        ("open_clip:ViT-B-32", "/no/such.safetensors", {"file": "/no/such.safetensors", "given": "missing"}),
    ],
)
def test_errors_of_unknown_models_and_weights(name: str, weights: str | None, data: dict[str, Any]) -> None:
    with raises(ModelError, **data):
        open_clip_classifier(name, ["cat"], weights=weights)
    with raises(ModelError, where="tokens"):
        open_clip_classifier("bundled_clip", ["cat", "very " * 30])
