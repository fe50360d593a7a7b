"""Selection by module paths, against what peft selects on the same models."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import timm
from torch import nn

import veneer
from tests.raising import raises
from veneer.injection.errors import OptionError, SelectionError
from veneer.injection.module_patterns import module_patterns
from veneer.injection.select import expand, patterns, select
from veneer.injection.sites import WeightSite
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.training_options import SiteOptions


@pytest.fixture
def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=12, num_heads=2, img_size=32, num_classes=3)


def paths(model: nn.Module, where: str | Sequence[str]) -> list[str]:
    sites = [site for site in veneer.sites(model) if isinstance(site, WeightSite)]
    return sorted(site.path for site in select(sites, where, frozenset({site.tower for site in sites})))


@pytest.mark.parametrize(
    "targets",
    [["qkv"], ["attn.proj", "fc1"], r".*\.attn\.(qkv|proj)", r"blocks\.\d{1,2}\.mlp\.fc[12]", ["blocks.1.mlp.fc2"]],
    ids=str,
)
def test_the_same_modules_as_in_peft(vit: nn.Module, targets: list[str] | str) -> None:
    peft = pytest.importorskip("peft")
    ours = paths(vit, module_patterns([targets] if isinstance(targets, str) else targets))
    adapted = peft.get_peft_model(vit, peft.LoraConfig(target_modules=targets))
    prefix = "base_model.model."
    theirs = {name.removeprefix(prefix).split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert ours == sorted(theirs)


def test_all_linear_is_each_linear_layer_but_the_head(vit: nn.Module) -> None:
    linear = {name for name, module in vit.named_modules() if isinstance(module, nn.Linear)}
    assert set(paths(vit, "module:all-linear")) == linear - {"head"}
    assert set(paths(vit, "module:all-linear not:module:fc2")) == {path for path in linear - {"head"} if "fc2" not in path}


def test_a_name_is_a_path_or_its_end_after_a_dot(vit: nn.Module) -> None:
    assert paths(vit, "module:proj") == ["blocks.0.attn.proj", "blocks.1.attn.proj", "patch_embed.proj"]
    for part in ("roj", "pro", "blocks"):
        with raises(SelectionError, pattern=f"module:{part}"):
            paths(vit, f"module:{part}")


def test_an_invalid_expression_is_an_error(vit: nn.Module) -> None:
    with raises(SelectionError, pattern="module:.*(q", given=".*(q"):
        paths(vit, "module:.*(q")


def test_expressions_keep_their_commas_and_braces() -> None:
    text = r"attn.{q, k}, not:module:a,b{1,2}.x module:c mlp,conv"
    assert patterns(text) == ["attn.{q, k}", "not:module:a,b{1,2}.x", "module:c", "mlp", "conv"]
    assert expand("not:module:a{1,2}") == ["not:module:a{1,2}"]


def test_an_attached_lora_is_that_of_the_fused_layer(vit: nn.Module) -> None:
    attachment = veneer.attach(vit, "lora", where="module:qkv", rank=2)
    assert [site.path for site, _ in attachment.parts.values()] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert sum(p.numel() for p in attachment.parameters()) == 2 * 2 * (12 + 36)


def test_options_select_by_one_of_the_two() -> None:
    assert SiteOptions(target_modules=("to_q", ".*v")).selection() == ("module:to_q", "module:.*v")
    assert SiteOptions(where=("attn",)).selection() == ("attn",)
    assert SiteOptions().selection() is None
    assert PersonalizeConfig(concept="<a>", target_modules=("to_q",)).with_defaults().where == ("module:to_q",)
    with raises(OptionError, option="target_modules", given=("to_q",)):
        SiteOptions(where=("attn",), target_modules=("to_q",)).selection()
