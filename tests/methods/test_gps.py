"""GPS: the inputs of each row with the largest |Σ g|, and all biases, against plain autograd on a bare model."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from tests.methods.selections import MODELS, at_sites, explicit, losses, plain_gradients, tiny
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.errors import EmptySelection, OptionError
from veneer.injection.sites import ParamSite
from veneer.methods.selective.entries.gps import GPS
from veneer.testing.case import loss


@pytest.mark.parametrize(("host", "name"), [MODELS[0], MODELS[2], ("timm_convnext", "convnext")])
def test_selection_outputs_and_gradients_are_those_of_a_masked_model(host: str, name: str) -> None:
    model, samples = tiny(host, name)
    bare = copy.deepcopy(model)
    first, second = plain_gradients(model, samples)
    tuned = attach(model, "gps", inputs=2)
    tuned.select(losses(model, samples))
    deltas, where = [], []
    sums = at_sites(tuned, {key: first[key] + second[key] for key in first})
    for (site, adapter), total in zip(tuned.parts.values(), sums, strict=True):
        p = next(adapter.parameters())
        assert torch.equal(p, torch.zeros_like(p))
        torch.nn.init.normal_(p, std=0.05)
        if isinstance(site, ParamSite):
            assert site.role.startswith("bias."), site.role
            where.append(torch.arange(total.numel()))
        else:
            rows = total.flatten(1).abs()
            best = rows.argsort(dim=1, descending=True)[:, :2]
            offsets = rows.shape[1] * torch.arange(len(rows))[:, None]
            scores = rows.flatten()
            chosen = adapter.own.indices.long()
            expected = scores[(best + offsets).flatten().sort().values]
            torch.testing.assert_close(scores[chosen], expected, rtol=1e-6, atol=1e-12)
            assert torch.equal(chosen // rows.shape[1], torch.arange(len(rows)).repeat_interleave(min(2, rows.shape[1])))
            where.append(chosen)
        delta = torch.zeros(total.numel()).double()
        delta[where[-1]] = p.detach().flatten().double()
        deltas.append(delta.reshape(total.shape))
    changed = explicit(bare, tuned, deltas)
    got = loss(model, samples[0])
    torch.testing.assert_close(got, loss(changed, samples[0]), rtol=1e-5, atol=1e-6)
    got.backward()
    (of_sample,) = plain_gradients(changed, samples[:1])
    for (_, adapter), indices, gradient in zip(tuned.parts.values(), where, at_sites(tuned, of_sample), strict=True):
        (p,) = adapter.parameters()
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grad.flatten().double(), gradient.flatten()[indices], rtol=1e-5, atol=1e-8)


def test_counts() -> None:
    """ViT-B/16: one input of each of 83,712 rows, and as many biases."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=10)
    tuned = attach(vit, "gps")
    assert tuned.report().trainable == 167_424
    assert tuned.report().summary == "83,712 of 85,524,480 entries selected"


def test_rows_with_fewer_inputs_are_trained_whole() -> None:
    model, _ = tiny("timm_convnext", "convnext")
    tuned = attach(model, "gps", inputs=1000, where="mlp.in")
    assert all(adapter.own.values.numel() == site.d_out * site.d_in for site, adapter in tuned.parts.values())


def test_bad_options_and_an_empty_selection() -> None:
    for option in ("inputs", "samples"):
        with raises(OptionError, method="gps", option=option, given=0):
            GPS(**{option: 0})
    tuned = attach(tiny("timm_vit", "vit")[0], "gps")
    with raises(EmptySelection, where="gps", given=0):
        tuned.select(())


def test_the_number_of_samples_holds_for_all_layers() -> None:
    model, _ = tiny("timm_vit", "vit")
    with raises(UnsupportedSite, option="by_site", given=("samples",)):
        attach(model, "gps", by_site={"mlp": {"samples": 2}})
