"""CLIP by open_clip: adapters on packed attention weights, which are read, in both towers; published sizes; the activation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.hosts import clips
from veneer.base_models import load_clip, path, quick_gelu_mismatch
from veneer.injection import attach
from veneer.injection.attachment.attachment import Attachment
from veneer.injection.registry import host_of, hosts
from veneer.injection.sites import NormSite, ParamSite, TokenSite, WeightSite
from veneer.injection.towers import sites
from veneer.testing.case import perturb

WHERE = "attn.{q,k,v,out}"
METHODS = ("lora", "dora", "ssf")
"""A method that adds to the weight, one that depends on it, and one with biases; `tests/matrix` has all on small models."""


BLOCKS = 2


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    """ViT-B-32 with fewer blocks, of the published widths."""
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-B-32")
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = BLOCKS
    return open_clip.model.CLIP(**config).eval().requires_grad_(False)


def tiny(key: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    return hosts.get("open_clip")().tiny()[key]()


def inputs(model: nn.Module) -> dict[str, Any]:
    return {name: value[:1] for name, value in hosts.get("open_clip")().sample(model).items()}


def features(model: Any, given: dict[str, Any]) -> Tensor:
    """Image and text features, of length 1, side by side."""
    image, text, *_ = model(**given)
    return torch.cat([image, text], -1)


def explicit(model: nn.Module, tuned: Attachment) -> dict[str, Tensor]:
    """Every changed tensor of the host, with its slices composed by hand."""
    host, found = tuned.host_state_dict(), {}
    for site, adapter in tuned.parts.values():
        assert isinstance(site, WeightSite)
        name, rows = f"{site.path}.{site.param}", slice(*site.rows) if site.rows else slice(None)
        weight = host[name].detach()[rows].clone()
        with torch.no_grad():
            found.setdefault(name, host[name].detach().clone())[rows] = adapter.weight(weight)
            if hasattr(adapter, "bias"):
                rows = slice(*site.bias_rows) if site.bias_rows else slice(None)
                bias = host[site.bias].detach()[rows].clone()
                found.setdefault(site.bias, host[site.bias].detach().clone())[rows] = adapter.bias(bias, lambda w=weight: w)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_attention_of_full_width_takes_gradients_equals_explicit_weights_and_comes_off(clip: nn.Module, method: str) -> None:
    given = inputs(clip)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    with torch.no_grad():
        bare = features(clip, given)
    tuned = attach(clip, method, where=WHERE)
    assert len(tuned.parts) == 2 * BLOCKS * 4
    perturb(tuned, size=0.02)
    changed = explicit(clip, tuned)
    got = {}
    for training in (False, True):
        clip.train(training)
        got[training, True] = features(clip, given)
        with torch.no_grad():
            got[training, False] = features(clip, given)
    loss = got[True, True] * torch.linspace(-1, 1, got[True, True].numel())
    loss.sum().backward()
    dead = [name for name, p in tuned.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    clip.eval()
    tuned.merge()
    merged = tuned.host_state_dict()
    for name, tensor in changed.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-5)
    tuned.unmerge()
    tuned.detach()
    after = clip.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        assert torch.equal(features(clip, given), bare)
        expected = torch.cat(functional_call(clip, changed, kwargs=given)[:2], -1)
    assert (expected - bare).abs().max() > 1e-3
    for key, value in got.items():
        torch.testing.assert_close(value.detach(), expected, atol=2e-5, rtol=0, msg=f"{method}, (training, grad) = {key}")


def test_lora_in_packed_attention_is_w_plus_b_a_of_each_slice() -> None:
    model = tiny().double()
    host = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = attach(model, "lora", where="attn.{q,k,v}", rank=2, alpha=3.0)
    perturb(tuned)
    state, given, changed = tuned.state_dict(), inputs(model), {}
    got = features(model, given).detach()
    for root, width in (("visual.transformer", 24), ("transformer", 20)):
        for block in range(2):
            place = f"{root}.resblocks.{block}.attn"
            pairs = [(state[f"{place}.{x}:up"], state[f"{place}.{x}:down"]) for x in "qkv"]
            assert all(b.shape == (width, 2) and a.shape == (2, width) for b, a in pairs)
            changed[f"{place}.in_proj_weight"] = host[f"{place}.in_proj_weight"] + 1.5 * torch.cat([b @ a for b, a in pairs])
    tuned.detach()
    expected = torch.cat(functional_call(model, changed, kwargs=given)[:2], -1)
    torch.testing.assert_close(got, expected.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_attention_in_training_is_one_graph_that_gives_every_gradient(method: str) -> None:
    """A block of each tower: compilation depends on operations, not on sizes."""
    torch.manual_seed(0)
    model = clips.build(vision={"layers": 1}, text={"layers": 1})
    tuned = attach(model, method, where=WHERE)
    perturb(tuned)
    given = inputs(model)
    torch._dynamo.reset()
    got = features(torch.compile(model.train(), fullgraph=True, backend="aot_eager"), given)
    torch.testing.assert_close(got, features(model, given), atol=1e-5, rtol=0)
    got.square().mul(torch.linspace(-1, 1, got.numel())).sum().backward()
    assert [name for name, p in tuned.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("where", "moved"), [("text/attn.*", (False, True)), ("vision/attn", (True, False)), ("attn", (True, True))]
)
@pytest.mark.parametrize("key", ["vit", "timm"])
def test_a_tower_name_selects_one_tower(key: str, where: str, moved: tuple[bool, bool]) -> None:
    model = tiny(key).eval()
    given = inputs(model)
    with torch.no_grad():
        before = model(**given)[:2]
        tuned = attach(model, "lora", where=where)
        perturb(tuned)
        after = model(**given)[:2]
    assert tuple(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) == moved
    assert {site.tower for site, _ in tuned.parts.values()} == {t for t, m in zip(("vision", "text"), moved, strict=True) if m}


def test_new_tokens_reach_a_separate_text_tower() -> None:
    """An id beyond the table is the trained row; the end of the text is located in the original ids."""
    model: Any = tiny("timm").eval()
    ids = inputs(model)["text"]
    tuned = attach(model, "textual_inversion", tokens="<one>", ids=(900,))
    new = ids.clone()
    new[:, 2] = 900
    table = model.text.token_embedding.weight.detach()
    (adapter,) = (a for _, a in tuned.parts.values())
    with torch.no_grad():
        adapter.vectors.copy_(table[ids[0, 2]])
        got = model.encode_text(new)
        tuned.detach()
        assert torch.equal(got, model.encode_text(ids))


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return open_clip.model.CLIP(**open_clip.get_model_config(name))


def spans(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Each parameter's name with the number of its values that sites offer, without those that are offered twice."""
    for site in sites(model):
        if isinstance(site, (WeightSite, ParamSite)) and not getattr(site, "fused", False):
            tensor = getattr(model.get_submodule(site.path), site.param)
            name = f"{site.path}.{site.param}" if site.path else site.param
            yield name, tensor[slice(*site.rows) if site.rows else ...].numel()


TEXT_ATTN, TEXT_MLP = 12 * 4 * (512 + 512), 12 * 2 * (512 + 2048)
VIT_ATTN, VIT_MLP = 12 * 4 * (768 + 768), 12 * 2 * (768 + 3072)


@pytest.mark.parametrize(
    ("name", "parameters", "attention", "pairs"),
    [
        ("ViT-B-32", 151_277_313, 96, TEXT_ATTN + TEXT_MLP + VIT_ATTN + VIT_MLP),
        ("ViT-B-16", 149_620_737, 96, TEXT_ATTN + TEXT_MLP + VIT_ATTN + VIT_MLP),
        ("RN50", 102_007_137, 48, TEXT_ATTN + TEXT_MLP),
    ],
)
def test_published_models_are_covered_to_the_last_parameter(name: str, parameters: int, attention: int, pairs: int) -> None:
    model = meta(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    covered: dict[str, int] = {}
    for parameter, count in spans(model):
        covered[parameter] = covered.get(parameter, 0) + count
    assert covered == {n: p.numel() for n, p in model.named_parameters()}
    tuned = attach(model, "lora", where=f"{WHERE} mlp", rank=4)
    assert (len(tuned.parts), tuned.report().trainable) == (attention + attention // 2, 4 * pairs)
    assert [s.role for s, _ in tuned.parts.values()].count("attn.k") == attention // 4
    assert tuned.report().uneven == ()


def test_every_convolution_and_the_reading_pool_of_a_resnet_are_named() -> None:
    model = meta("RN50")
    weights = [s for s in sites(model) if isinstance(s, WeightSite) and s.tower == "vision"]
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {s.name for s in weights if s.kind == "conv"} == convolutions
    assert len(convolutions) == 3 + 16 * 3 + 4
    assert {s.role: s.called for s in weights if s.kind == "linear"} == dict.fromkeys(
        ("pool.q", "pool.k", "pool.v", "pool.out"), False
    )
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {s.name for s in sites(model) if isinstance(s, NormSite) and s.tower == "vision"} == norms


def test_tokens_may_be_inserted_among_patches_and_not_among_text_tokens() -> None:
    found = {s.tower: s.can_insert for s in sites(tiny()) if isinstance(s, TokenSite)}
    assert found == {"vision": True, "text": False}


def test_the_bundled_clip_is_of_this_host_and_its_image_tower_is_one_of_timm() -> None:
    import timm

    bundled = load_clip()
    tower = timm.create_model(f"local-dir:{path('bundled_clip')}", pretrained=True).eval()
    assert (host_of(bundled.model).name, host_of(tower).name) == ("open_clip", "timm_vit")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), bundled.encode_image(pixels), atol=1e-4, rtol=0)
    tuned = attach(bundled.model, "lora")
    assert len(tuned.parts) == 4 * (5 + 2)
    tuned.detach()


@pytest.mark.parametrize(
    ("quick", "name", "pretrained", "wanted"),
    [
        (False, "ViT-B-32", "openai", "ViT-B-32-quickgelu"),
        (False, "ViT-B-32", "/weights/ViT-B-32.pt", "ViT-B-32-quickgelu"),
        (True, "ViT-B-32-quickgelu", "laion2b_s34b_b79k", "Use 'ViT-B-32',"),
        (True, "ViT-B-32-quickgelu", "openai", None),
        (True, "ViT-B-32", "openai", None),
        (False, "ViT-B-32", "laion2b_s34b_b79k", None),
        (False, "ViT-B-32", "/weights/mine.pt", None),
        (False, "no-such-model", "openai", None),
    ],
)
def test_weights_trained_with_another_activation_are_reported(
    quick: bool, name: str, pretrained: str, wanted: str | None
) -> None:
    said = quick_gelu_mismatch(tiny("vit_quick_gelu" if quick else "vit"), name, pretrained)
    assert said is None if wanted is None else said is not None and wanted in said


def test_open_clips_own_table_says_which_published_weights_need_quick_gelu() -> None:
    """What open_clip itself warns of, for every published tag of three architectures."""
    for name in ("ViT-B-32", "ViT-L-14", "RN50"):
        for tag in open_clip.list_pretrained_tags_by_model(name):
            quick = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
            assert (quick_gelu_mismatch(tiny(), name, tag) is not None) == quick, (name, tag)


def test_the_head_of_a_timm_trunk_is_a_projection() -> None:
    """It gives features of the common space, not logits."""
    vision = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": None}
    found = {s.name: s.role for s in sites(clips.build("CustomTextCLIP", vision)) if isinstance(s, (WeightSite, ParamSite))}
    assert found["visual.trunk.head"] == "proj.out"
    assert found["visual.trunk.head.bias"] == "bias.proj.out"
    assert {"head", "bias.head"}.isdisjoint(found.values())
