"""A config is what the command line sets and what a file stores."""

import dataclasses
import json

import pytest

from veneer.injection.registry import methods
from veneer.methods.reparameterized.lora import LoRA


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
