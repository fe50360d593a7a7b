"""LoRA-FA: W + s·B A with A frozen: trained and saved tensors, and those kept for the backward pass."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from tests.raising import raises
from veneer.injection import attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.low_rank.lora_fa import LoRAFA

LINEAR = WeightSite(name="l", role="mlp.in", path="l", d_out=5, d_in=7)
GROUPED = WeightSite(
    name="c", role="conv", path="c", kind="conv", d_out=8, d_in=4, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1),
    groups=2,
)  # fmt: skip
TABLE = WeightSite(name="t", role="embed.token", path="t", kind="embedding", d_out=4, d_in=9)


def test_linear() -> None:
    torch.manual_seed(0)
    adapter = LoRAFA(rank=3, alpha=6).build(LINEAR).double()
    nn.init.normal_(adapter.up)
    base, x = nn.Linear(7, 5).double(), torch.randn(2, 7, dtype=torch.float64)
    weight = base.weight.clone()
    for o in range(5):
        for i in range(7):
            weight[o, i] = weight[o, i] + 6 / 3 * sum(adapter.up[o, r] * adapter.down[r, i] for r in range(3))
    torch.testing.assert_close(adapter.output(x, base(x)), F.linear(x, weight, base.bias))
    torch.testing.assert_close(adapter.weight(base.weight), weight)


def test_grouped_convolution() -> None:
    torch.manual_seed(0)
    base, x = nn.Conv2d(4, 8, 3, padding=1, groups=2).double(), torch.randn(2, 4, 5, 6, dtype=torch.float64)
    adapter = LoRAFA(rank=4).build(GROUPED).double()
    nn.init.normal_(adapter.up)
    weight = base.weight.clone()
    for o in range(8):
        weight[o] = weight[o] + sum(adapter.up[o, r].reshape(()) * adapter.down[o // 4 * 2 + r] for r in range(2))
    torch.testing.assert_close(adapter.output(x, base(x)), F.conv2d(x, weight, base.bias, padding=1, groups=2))
    torch.testing.assert_close(adapter.weight(base.weight), weight)


@pytest.mark.parametrize("site", [LINEAR, GROUPED, TABLE], ids=lambda s: s.kind)
def test_only_b_is_trained_and_a_is_saved_with_it(site: WeightSite) -> None:
    method = LoRAFA(rank=4)
    adapter, weight = method.build(site), torch.randn(site.weight_shape)
    assert torch.equal(adapter.weight(weight), weight)
    assert [k for k, _ in adapter.named_parameters()] == ["up"]
    assert set(adapter.state_dict()) == {"up", "down"}
    assert adapter.down.abs().min() > 0
    assert method.count(site) == adapter.up.numel()


def test_a_backward_pass_keeps_a_x_and_not_x() -> None:
    adapter, kept = LoRAFA(rank=3).build(LINEAR), []
    x = torch.randn(11, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        adapter.output(x, torch.zeros(11, 5))
    assert (11, 3) in kept
    assert (11, 7) not in kept


def test_count_of_vit_b() -> None:
    """12 blocks, q and v, 768·8 each."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert attach(vit, "lora_fa", where="attn.{q,v}").report().trainable == 147_456


def test_rejections() -> None:
    with raises(OptionError, method="lora_fa", option="rank", given=0):
        LoRAFA(rank=0)


def test_a_rank_that_groups_do_not_divide_has_one_a_for_all() -> None:
    method = LoRAFA(rank=3)
    adapter = method.build(GROUPED)
    assert (adapter.up.shape[1], method.count(GROUPED)) == (3, 3 * 8)
