"""P-Tuning: its encoders step by step, prompts before and after `finalize`, and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import veneer
from tests.methods import bottlenecks, classifiers
from tests.methods.bottlenecks import stirred
from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.methods.prompt.soft_prompts.p_tuning import PTuning


def lstm(x: Tensor, weights: Any, suffix: str, width: int) -> Tensor:
    """One direction of one layer, gate by gate."""
    w_x, w_h, b_x, b_h = (getattr(weights, f"{name}_{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, c, out = x.new_zeros(width), x.new_zeros(width), []
    for vector in x:
        i, f, g, o = (w_x @ vector + b_x + w_h @ h + b_h).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out)


def encode(adapter: Any, kind: str) -> Tensor:
    """The vectors that the encoder computes from the table."""
    x, encoder = adapter.context, adapter.encoder
    if kind == "none":
        return x
    layers = encoder.head if kind == "lstm" else encoder
    if kind == "lstm":
        for layer in ("l0", "l1"):
            both = (
                lstm(x, encoder.lstm, layer, x.shape[1] // 2),
                lstm(x.flip(0), encoder.lstm, f"{layer}_reverse", x.shape[1] // 2),
            )
            x = torch.cat([both[0], both[1].flip(0)], 1)
    for i in range(0, len(layers), 2):
        x = x @ layers[i].weight.T + layers[i].bias
        x = x.clamp(min=0) if i + 1 < len(layers) else x
    return x


@pytest.mark.parametrize("kind", ["lstm", "mlp", "none"])
@pytest.mark.parametrize("host", ["image", "text"])
def test_prompts_of_the_encoder_and_without_it(kind: str, host: str, tmp_path: Path) -> None:
    """Values and gradients are those of `prompt_tuning` with the vectors; `finalize` leaves the function as it was."""
    tools: Any = bottlenecks if host == "image" else classifiers
    x = bottlenecks.picture() if host == "image" else classifiers.pictures()
    model, other = tools.tiny(), tools.tiny()
    tuned = attach(model, "p_tuning", tokens=4, encoder=kind)
    (adapter,) = stirred(tuned).values()
    plain = attach(other, "prompt_tuning", tokens=4)
    vectors = encode(adapter, kind)
    (free,) = plain.parameters()
    with torch.no_grad():
        free.copy_(vectors)
    got, expected = model(x), other(x)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(expected.square().sum(), free)
    parameters = list(tuned.parameters())
    wanted = torch.autograd.grad(vectors, parameters, gradient)
    for a, b in zip(torch.autograd.grad(got.square().sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 0
    tuned.finalize()
    assert {name.rpartition(":")[2] for name in tuned.state_dict()} == {"context"}
    torch.testing.assert_close(model(x), got)
    loaded = tools.tiny()
    assert veneer.load(loaded, tuned.save(tmp_path / "x")).method == PTuning(tokens=4, encoder="none")
    assert torch.equal(loaded(x), model(x))


def test_start_position_and_counts() -> None:
    """ViT-B/16 with p = 20: 15,360 vectors, with the LSTM 8,286,720, with the MLP 1,787,136."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224")
    for encoder, count in {"lstm": 8_286_720, "mlp": 1_787_136, "none": 15_360}.items():
        tuned = attach(vit, "p_tuning", encoder=encoder)
        assert tuned.report().trainable == count == PTuning(encoder=encoder).count(tuned.parts["tokens"][0])
        site = tuned.parts["tokens"][0]
        tuned.detach()
    torch.manual_seed(0)
    for encoder, std in {"mlp": 1.0, "none": 0.02}.items():
        adapter: Any = PTuning(encoder=encoder).build(site)
        assert adapter.context.std().item() == pytest.approx(std, rel=0.03)
    model, other, image = classifiers.tiny(), classifiers.tiny(), classifiers.pictures()
    tuned, coop = (
        attach(model, "p_tuning", tokens=4, encoder="none", position="middle"),
        attach(other, "coop", tokens=4, position="middle"),
    )
    coop.load_state_dict(tuned.state_dict())
    assert torch.equal(model(image), other(image))


def test_dropout_acts_between_the_layers_of_the_lstm_in_training_only() -> None:
    model = bottlenecks.tiny()
    ((_, adapter),) = attach(model, "p_tuning", tokens=4, dropout=0.5).parts.values()
    assert torch.equal(adapter.vectors(), adapter.vectors())
    adapter.train()
    assert not torch.equal(adapter.vectors(), adapter.vectors())


@pytest.mark.parametrize(("option", "given"), [("tokens", 0), ("encoder", "gru"), ("dropout", 1.0), ("position", "side")])
def test_options_out_of_range(option: str, given: Any) -> None:
    options: dict[str, Any] = {option: given}
    with raises(OptionError, method="p_tuning", option=option, given=given):
        PTuning(**options)
