"""A config is what the command line sets and what a file stores."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from veneer.injection import SelectionError, UnsupportedSite
from veneer.injection.registry import methods
from veneer.methods.reparameterized.lora import LoRA

from ..formats.cases import fill
from .toy import net


@pytest.mark.parametrize("name", methods.names())
def test_a_config_survives_json(name: str) -> None:
    method = methods.get(name)()
    again = methods.get(name).from_config(json.loads(json.dumps(method.config())))
    assert again == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.learning_rate = 1.0


def test_options_of_one_method_survive_json() -> None:
    method = LoRA(rank=3, alpha=1.5, ranks={"mlp": 2}, alphas={"name:x": 4.0}, rslora=True, init="gaussian")
    assert LoRA.from_config(json.loads(json.dumps(method.config()))) == method


def test_an_unknown_option_is_named_with_those_there_are() -> None:
    with pytest.raises(TypeError, match=r"lora: unknown option rnak\. It has: .*dropout.*rank"):
        LoRA.from_config({"rnak": 3})


def test_other_options_at_some_sites_are_built_saved_and_loaded(tmp_path: Path) -> None:
    other = {"attn.*": {"rank": 2}, "name:qkv.v": {"rank": 3, "alpha": 6.0}, "attn.q": {"alpha": 5.0}}
    tuned = veneer.attach(net(), "dora", where="attn.{q,k,v} head", rank=1, by_site=other)
    made = {name: (adapter.down.shape[0], adapter.scaling) for name, (_, adapter) in tuned.parts.items()}
    assert made == {"qkv.q": (2, 2.5), "qkv.k": (2, 1.0), "qkv.v": (3, 2.0), "head": (1, 1.0)}
    again = veneer.load(net(), fill(tuned).save(tmp_path / "x"))
    assert again.method == tuned.method
    assert all(torch.equal(again.state_dict()[key], value) for key, value in tuned.state_dict().items())


def test_options_at_sites_that_are_not_chosen_and_unknown_ones_are_refused() -> None:
    model = net()
    with pytest.raises(SelectionError, match=r"by_site has mlp\.\*, name:qkv\.o"):
        veneer.attach(model, "dora", where="attn.q", by_site={"mlp.*": {"rank": 2}, "name:qkv.o": {"rank": 2}})
    with pytest.raises(UnsupportedSite, match=r"qkv\.q: by_site has rnak"):
        veneer.attach(model, "dora", where="attn.q", by_site={"attn.q": {"rnak": 2}})
    assert veneer.attachments(model) == []


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dora", {"by_site": {"attn.{q,zz}": {"rank": 2}}}),
        ("lora", {"ranks": {"attn.{q,zz}": 2}}),
        ("lora", {"alphas": {"attn.{zz,q}": 2.0}}),
    ],
)
def test_every_alternative_of_a_key_by_site_must_match(method: str, options: dict[str, Any]) -> None:
    model = net()
    with pytest.raises(SelectionError) as raised:
        veneer.attach(model, method, where="attn.{q,k}", **options)
    assert raised.value.pattern == "attn.zz"
    assert veneer.attachments(model) == []


def test_braces_in_keys_by_site_mean_each_alternative() -> None:
    tuned = veneer.attach(net(), "dora", where="attn.{q,k,v}", rank=1, by_site={"attn.{q,v}": {"rank": 2}})
    assert {name: adapter.down.shape[0] for name, (_, adapter) in tuned.parts.items()} == {"qkv.q": 2, "qkv.k": 1, "qkv.v": 2}
    tuned = veneer.attach(net(), "lora", where="attn.{q,k,v}", rank=1, ranks={"attn.{q,v}": 2})
    assert {name: adapter.down.shape[0] for name, (_, adapter) in tuned.parts.items()} == {"qkv.q": 2, "qkv.k": 1, "qkv.v": 2}
