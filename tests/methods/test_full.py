"""Full fine-tuning: every parameter of a host, beside an unchanged base."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import veneer
from tests.raising import raises
from veneer.injection import attach, hosts
from veneer.injection.errors import OptionError
from veneer.methods.selective.tensors.full import Full
from veneer.testing.snapshot import assert_same, snapshot

HOSTS = ("timm_vit", "timm_swin", "timm_convnext", "timm_conv", "open_clip")


def models() -> Iterator[Any]:
    for host in HOSTS:
        for key in hosts.get(host)().tiny():
            yield pytest.param(host, key, id=f"{host}-{key}")


def tiny(host: str, key: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    found = hosts.get(host)()
    model = found.tiny()[key]().eval()
    return model, found.sample(model)


@pytest.mark.parametrize(("host", "key"), list(models()))
def test_every_parameter_is_covered_once(host: str, key: str) -> None:
    model, _ = tiny(host, key)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    tuned = attach(model, "full")
    covered = dict.fromkeys(sizes, 0)
    for site, adapter in tuned.parts.values():
        covered[f"{site.path}.{site.param}".lstrip(".")] += adapter.value.numel()
    assert covered == sizes
    assert tuned.report().trainable == sum(sizes.values())


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(("host", "key"), [("timm_vit", "vit"), ("timm_conv", "resnet"), ("open_clip", "vit")])
def test_steps_are_those_of_the_unfrozen_model(host: str, key: str) -> None:
    model, inputs = tiny(host, key)
    plain = copy.deepcopy(model)
    before = snapshot(model)
    tuned = attach(model, "full")
    for each, parameters in ((model, tuned.parameters()), (plain, plain.parameters())):
        optimizer = torch.optim.SGD(list(parameters), 1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            first(each(**inputs)).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(first(model(**inputs)), first(plain(**inputs)))
        for site, adapter in tuned.parts.values():
            learnt = getattr(plain.get_submodule(site.path), site.param)
            torch.testing.assert_close(adapter.value, learnt[slice(*site.rows) if site.rows else ...], msg=site.name)
    tuned.detach()
    assert_same(before, snapshot(model), "detach()")


def test_a_file_is_a_whole_model(tmp_path: Path) -> None:
    """The base's values do not matter, as all are in the file."""
    model, inputs = tiny("timm_vit", "vit")
    tuned = attach(model, "full")
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        expected = model(**inputs)
        path = tuned.save(tmp_path / "full")
        torch.manual_seed(9)
        other = hosts.get("timm_vit")().tiny()["vit"]().eval()
        veneer.load(other, path)
        assert torch.equal(other(**inputs), expected)


def test_a_part_can_be_named() -> None:
    model, _ = tiny("timm_vit", "vit")
    tuned = attach(model, "full", where="*@-1:")
    assert tuned.report().trainable == sum(p.numel() for p in model.blocks[1].parameters() if not p.requires_grad)
    assert {s.depth for s, _ in tuned.parts.values()} == {1}


def test_counts() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert attach(vit, "full").report().trainable == 85_798_656


def test_the_head_has_a_rate_of_its_own() -> None:
    model, _ = tiny("timm_vit", "vit")
    tuned = attach(model, "full", head_rate=7)
    rest, head = tuned.groups()
    assert (rest["lr_scale"], head["lr_scale"]) == (1.0, 7)
    assert {tuple(p.shape) for p in head["params"]} == {(10, 24), (10,)}
    assert len(rest["params"]) + len(head["params"]) == len(list(tuned.parameters()))
    with raises(OptionError, method="full", option="head_rate", given=0):
        Full(head_rate=0)
