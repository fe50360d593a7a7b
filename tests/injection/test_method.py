"""Configs of methods: JSON, unknown options and `by_site`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.formats.cases import fill, rewrite
from tests.injection.toy import net
from tests.raising import raises
from veneer.injection import SelectionError, UnsupportedSite, hosts, methods
from veneer.injection.errors import UnknownOption
from veneer.methods.reparameterized.low_rank.lora import LoRA


@pytest.mark.parametrize("name", methods.names())
def test_a_config_survives_json(name: str) -> None:
    method = methods.get(name)()
    again = methods.get(name).from_config(json.loads(json.dumps(method.config())))
    assert again == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.learning_rate = 1.0


def test_options_of_one_method_survive_json() -> None:
    method = LoRA(rank=3, alpha=1.5, by_site={"mlp": {"rank": 2}, "name:x": {"alpha": 4.0}}, rslora=True, init="gaussian")
    assert LoRA.from_config(json.loads(json.dumps(method.config()))) == method


def test_the_error_for_an_unknown_option_lists_the_options() -> None:
    with raises(UnknownOption, name="rnak", where="lora") as caught:
        LoRA.from_config({"rnak": 3})
    assert {"dropout", "rank"} <= set(caught.value.expected)


def test_other_options_at_some_sites_are_built_saved_and_loaded(tmp_path: Path) -> None:
    other = {"attn.*": {"rank": 2}, "name:qkv.v": {"rank": 3, "alpha": 6.0}, "attn.q": {"alpha": 5.0}}
    tuned = veneer.attach(net(), "dora", where="attn.{q,k,v} head", rank=1, by_site=other)
    built = {name: (adapter.down.shape[0], adapter.scaling) for name, (_, adapter) in tuned.parts.items()}
    assert built == {"qkv.q": (2, 2.5), "qkv.k": (2, 1.0), "qkv.v": (3, 2.0), "head": (1, 1.0)}
    again = veneer.load(net(), fill(tuned).save(tmp_path / "x"))
    assert again.method == tuned.method
    assert all(torch.equal(again.state_dict()[key], value) for key, value in tuned.state_dict().items())


def test_options_for_unselected_sites_and_unknown_options_are_rejected() -> None:
    model = net()
    with raises(SelectionError, where="by_site", given=("mlp.*", "name:qkv.o")):
        veneer.attach(model, "dora", where="attn.q", by_site={"mlp.*": {"rank": 2}, "name:qkv.o": {"rank": 2}})
    with raises(UnsupportedSite, site="qkv.q", option="by_site", given=("rnak",)):
        veneer.attach(model, "dora", where="attn.q", by_site={"attn.q": {"rnak": 2}})
    assert veneer.attachments(model) == []


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dora", {"by_site": {"attn.{q,zz}": {"rank": 2}}}),
        ("lora", {"by_site": {"attn.{zz,q}": {"alpha": 2.0}}}),
    ],
)
def test_every_alternative_of_a_pattern_of_by_site_must_match(method: str, options: dict[str, Any]) -> None:
    model = net()
    with pytest.raises(SelectionError) as raised:
        veneer.attach(model, method, where="attn.{q,k}", **options)
    assert raised.value.pattern == "attn.zz"
    assert veneer.attachments(model) == []


def test_braces_in_patterns_of_by_site_mean_each_alternative() -> None:
    tuned = veneer.attach(net(), "dora", where="attn.{q,k,v}", rank=1, by_site={"attn.{q,v}": {"rank": 2}})
    assert {name: adapter.down.shape[0] for name, (_, adapter) in tuned.parts.items()} == {"qkv.q": 2, "qkv.k": 1, "qkv.v": 2}
    tuned = veneer.attach(net(), "lora", where="attn.{q,k,v}", rank=1, by_site={"attn.{q,v}": {"rank": 2}})
    assert {name: adapter.down.shape[0] for name, (_, adapter) in tuned.parts.items()} == {"qkv.q": 2, "qkv.k": 1, "qkv.v": 2}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_file_may_have_patterns_of_by_site_that_match_nothing(method: str, tmp_path: Path) -> None:
    """The file may be of a model with other layers."""
    by_site = {"attn.q": {"rank": 2}, "head": {"rank": 3}}
    tuned = fill(veneer.attach(net(), method, where="attn.q head", by_site=by_site))

    def remove_head(header: dict[str, Any]) -> None:
        metadata = json.loads(header["__metadata__"]["veneer"])
        metadata["attachments"][0]["sites"].remove("head")
        header["__metadata__"]["veneer"] = json.dumps(metadata)

    path = rewrite(tuned.save(tmp_path / "x"), remove_head, tmp_path / "y.safetensors")
    again = veneer.load(net(), path, strict=False)
    assert again.method == tuned.method
    assert all(torch.equal(value, tuned.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("method", "options"), [("vpt", {"project": 5}), ("fact", {"rank": 5}), ("vera", {"rank": 5}), ("lst", {"reduction": 4})]
)
def test_by_site_cannot_change_shared_options(method: str, options: dict[str, Any]) -> None:
    model = hosts.get("timm_vit")().tiny()["vit"]()
    first = next(iter(veneer.attach(model, method).parts))
    veneer.attachments(model)[0].detach()
    with pytest.raises(UnsupportedSite) as raised:
        veneer.attach(model, method, by_site={f"name:{first}": options})
    assert raised.value.site == first
    assert veneer.attachments(model) == []
