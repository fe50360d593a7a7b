"""Learning rates by block: which parameters get which factor, and selections that match nothing."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from tests.raising import raises
from veneer.injection import attach, methods
from veneer.injection.errors import OptionError, SelectionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training import attach_methods, param_groups
from veneer.training.block_learning_rates import with_block_rates


def rates_by_site(attached: list[Any], groups: list[Any]) -> dict[str, set[float]]:
    """Site name -> the `lr_scale` of its parameters."""
    names = {id(p): key.rpartition(":")[0].partition("/")[2] for key, p in param_groups.named_parameters(attached).items()}
    found: dict[str, set[float]] = {}
    for group in groups:
        for parameter in group["params"]:
            found.setdefault(names[id(parameter)], set()).add(round(group["lr_scale"], 6))
    return found


@pytest.fixture(scope="module")
def attached() -> list[Any]:
    config = [methods.get("lora")(rank=2)]
    return attach_methods.attach_all(tiny_pipeline("sd"), config, {"lora": ("attn",)}, text_encoder=True, seed=0)


def groups_of(attached: list[Any], factors: dict[str, float]) -> list[Any]:
    groups = param_groups.parameter_groups(attached, {"lora": 1e-3}, 5e-4, 1e-3)
    return with_block_rates(groups, attached, factors)


def test_each_site_gets_the_factor_of_its_block(attached: list[Any]) -> None:
    """Text encoders have half the rate already; the factor multiplies it. Other blocks keep theirs."""
    factors = {"unet.down": 0.5, "text": 0.2, "unet.up/attn.q": 0.1}
    expected = {}
    for name, (site, _) in attached[0].parts.items():
        text = site.component == "text_encoder"
        factor = 0.2 if text else 0.5 if str(site.stage).startswith("down") else 1.0
        if str(site.stage).startswith("up") and site.role == "attn.q":
            factor = 0.1
        expected[name] = {round(factor * (0.5 if text else 1.0), 6)}
    found = rates_by_site(attached, groups_of(attached, factors))
    assert found == expected
    assert {0.5, 0.1, 1.0} <= {rate for rates in found.values() for rate in rates}


def test_every_parameter_stays_in_exactly_one_group(attached: list[Any]) -> None:
    groups = groups_of(attached, {"unet.down": 0.5, "unet.mid": 0.25})
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in attached[0].parameters())
    assert len({group["name"] for group in groups}) == len(groups)


def test_the_last_selection_that_matches_applies(attached: list[Any]) -> None:
    first = rates_by_site(attached, groups_of(attached, {"unet": 0.5, "unet.down": 0.1}))
    second = rates_by_site(attached, groups_of(attached, {"unet.down": 0.1, "unet": 0.5}))
    down = [name for name, (site, _) in attached[0].parts.items() if str(site.stage).startswith("down")]
    assert {rate for name in down for rate in first[name]} == {0.1}
    assert {rate for name in down for rate in second[name]} == {0.5}


@pytest.mark.parametrize("text", ["unet.dwn", "mlp", "vae", "unet.up/mlp"])
def test_a_selection_that_matches_no_trained_parameter_is_an_error(attached: list[Any], text: str) -> None:
    with raises(SelectionError, where="block_lr", pattern=text):
        groups_of(attached, {"unet.down": 0.5, text: 0.1})


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_must_be_above_zero(attached: list[Any], factor: float) -> None:
    with pytest.raises(OptionError) as caught:
        groups_of(attached, {"unet.down": factor})
    assert (caught.value.option, caught.value.where) == ("block_lr", "unet.down")


def test_blocks_of_a_vision_transformer_by_depth() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    tuned = attach(model, "bitfit")
    groups = with_block_rates(tuned.groups(), [tuned], {"bias@0:1": 0.5})  # type: ignore[arg-type]
    found = rates_by_site([tuned], groups)
    depths = {name: site.depth for name, (site, _) in tuned.parts.items()}
    assert {name: rates == {0.5} for name, rates in found.items()} == {name: depths[name] == 0 for name in found}
    assert 0 in depths.values()


def test_base_weights_that_train_as_well_have_a_block() -> None:
    pipe = tiny_pipeline("sd")
    tuned = attach(pipe, "lora", where=["xattn.q"], train=["attn.out"])
    groups = with_block_rates(tuned.groups(), [tuned], {"unet.mid": 0.5})  # type: ignore[arg-type]
    found = rates_by_site([tuned], groups)
    halved = {name for name, rates in found.items() if rates == {0.5}}
    assert halved == {name for name in found if ".mid_block." in name}
    assert any(name.endswith("to_out.0") for name in halved)


def test_sites_with_different_factors_must_not_share_a_parameter() -> None:
    tuned = attach(tiny_pipeline("sd"), "fact")
    with pytest.raises(SelectionError) as caught:
        with_block_rates(tuned.groups(), [tuned], {"unet.down": 0.5})  # type: ignore[arg-type]
    assert caught.value.where == "block_lr"
    assert len(set(caught.value.given.values())) == 2
    whole = with_block_rates(tuned.groups(), [tuned], {"unet": 0.5})  # type: ignore[arg-type]
    assert {group["lr_scale"] for group in whole} == {0.5 * group.get("lr_scale", 1.0) for group in tuned.groups()}


def test_a_halved_block_moves_half_as_far() -> None:
    """One step of SGD without momentum: the update is proportional to the factor."""
    weights = {}
    for factor in (1.0, 0.5):
        pipe = tiny_pipeline("sd")
        tuned = attach_methods.attach_all(pipe, [methods.get("lora")(rank=2)], {}, text_encoder=False, seed=0)
        groups = with_block_rates(tuned[0].groups(), tuned, {"unet.down": factor})  # type: ignore[arg-type]
        before = {key: p.detach().clone() for key, p in tuned[0].named_parameters()}
        for _, parameter in tuned[0].named_parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD([{"params": g["params"], "lr": 0.1 * g["lr_scale"]} for g in groups]).step()
        weights[factor] = {key: p.detach() - before[key] for key, p in tuned[0].named_parameters()}
    for key, move in weights[1.0].items():
        torch.testing.assert_close(weights[0.5][key], move * (0.5 if ".down_blocks." in key else 1.0))
