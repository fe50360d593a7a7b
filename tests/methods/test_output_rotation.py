"""OFT and BOFT on the output side, W' = D R W and y' = D R (y − b) + b, against dense matrices built from their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.layers import conv_site, trained
from tests.raising import raises
from veneer.injection.errors import OptionError
from veneer.injection.sites import WeightSite
from veneer.methods.reparameterized.rotation.boft import BOFT
from veneer.methods.reparameterized.rotation.oft import OFT
from veneer.testing import Check, parametrize_with_checks

LINEAR = WeightSite(name="l", role="attn.q", path="l", d_out=24, d_in=5)
METHODS = [
    OFT(side="output", blocks=3),
    OFT(side="output", block_size=2, share=True, rescale=True),
    OFT(side="output", blocks=4, coft=0.01),
    OFT(side="output", block_size=1, rescale=True),
    BOFT(side="output", m=1, b=3),
    BOFT(side="output", m=3, b=6, rescale=True),
]


def dense(adapter: Any, d: int) -> Tensor:
    """D R, one rotation of one block after the other: entry (2^i·b·g + h·2^i·b/2 + p·b/2 + e) is in half h of its block."""
    entries = adapter.skew.detach()
    stages = entries if entries.ndim == 3 else entries.unsqueeze(0)
    b, whole = adapter.size, torch.eye(d, dtype=torch.float64)
    for i, stage in enumerate(stages):
        rotation = torch.zeros(d, d, dtype=torch.float64)
        for n in range(d // b):
            q, values = torch.zeros(b, b, dtype=torch.float64), iter(stage[n % len(stage)])
            for r in range(b):
                for c in range(r + 1, b):
                    q[r, c] = next(values)
            q = q - q.T
            if adapter.radius is not None and q.norm() > adapter.radius:
                q = q * adapter.radius / q.norm()
            group, place = divmod(n, 2**i)
            where = [n]
            if b > 1:
                half, far = b // 2, 2**i * (b // 2)
                where = [2 * far * group + half * place + e for e in range(half)]
                where += [w + far for w in where]
            if i == 0:
                where = list(range(b * n, b * n + b))
            eye = torch.eye(b, dtype=torch.float64)
            rotation[torch.tensor(where)[:, None], torch.tensor(where)] = (eye + q) @ torch.linalg.inv(eye - q)
        whole = rotation @ whole
    torch.testing.assert_close(whole.T @ whole, torch.eye(d, dtype=torch.float64))
    return whole if adapter.magnitude is None else adapter.magnitude.detach()[:, None] * whole


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_linear(method: Any) -> None:
    adapter: Any = trained(method, LINEAR)
    base = nn.Linear(5, 24).double()
    adapter.__dict__["host"] = base
    turn, x = dense(adapter, 24), torch.randn(2, 7, 5, dtype=torch.float64)
    for strength in (1.0, 0.25):
        adapter.strength.fill_(strength)
        weight = base.weight + strength * (turn @ base.weight - base.weight)
        torch.testing.assert_close(adapter.weight(base.weight), weight)
        torch.testing.assert_close(adapter.output(x, base(x)), nn.functional.linear(x, weight, base.bias))
    assert sum(p.numel() for p in adapter.parameters()) == method.count(LINEAR)


@pytest.mark.parametrize("geometry", [{"kernel_size": 3, "padding": 1}, {"kernel_size": (3, 1), "stride": 2, "groups": 2}])
@pytest.mark.parametrize("method", [METHODS[1], METHODS[5]], ids=str)
def test_convolutions_rotate_their_channels(method: Any, geometry: dict[str, Any]) -> None:
    base = nn.Conv2d(4, 48, **geometry).double()
    adapter: Any = trained(method, conv_site(base))
    adapter.__dict__["host"] = base
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    weight = (dense(adapter, 48) @ base.weight.flatten(1)).reshape(base.weight.shape)
    torch.testing.assert_close(adapter.weight(base.weight), weight)
    want = nn.functional.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation, base.groups)
    torch.testing.assert_close(adapter.output(x, base(x)), want)


def test_groups_are_not_mixed() -> None:
    model = nn.Conv2d(4, 12, 3, groups=2)
    with raises(OptionError, option="side", given=4, expected=6):
        OFT(side="output", block_size=4).build(conv_site(model))


@pytest.mark.parametrize("method", [OFT, BOFT])
def test_what_a_side_may_be(method: Any) -> None:
    with raises(OptionError, method=method.name, option="side", given="both"):
        method(side="both")
    with raises(OptionError, method="oft", option="block_size", given=1):
        OFT(side="output", block_size=1)


TURNS = [OFT(side="output", block_size=2), BOFT(side="output", b=2, rescale=True)]


@parametrize_with_checks([(method, "clip_text") for method in TURNS], once=["compiles_to_one_graph"])
def test_it_passes_the_conformance_suite(check: Check) -> None:
    """Beside other adapters, compiled, checkpointed, in half precision: all checks of the suite."""
    check()
