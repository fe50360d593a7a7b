"""Blending, casting and row slices, against explicit formulas."""

import torch
from torch import Tensor

from veneer.injection.method import Adapter
from veneer.injection.seams.adapter_calls import apply_by_rows, base_tensor, blend, cast, first_argument, main_output
from veneer.injection.sites import WeightSite


class Affine(Adapter):
    """3 y + 1, blended by the seam."""

    def output(self, y: Tensor) -> Tensor:
        return 3 * y + 1


def test_a_blend_is_the_host_at_zero_and_the_adapter_at_one_bitwise() -> None:
    adapter, y = Affine(), torch.randn(100) * 1e3
    for strength, expected in ((0.0, y), (1.0, 3 * y + 1)):
        adapter.strength.fill_(strength)
        assert torch.equal(blend(adapter, adapter.output, y), expected)
    adapter.strength.fill_(0.25)
    torch.testing.assert_close(blend(adapter, adapter.output, y), 0.75 * y + 0.25 * (3 * y + 1))


def test_rows_without_an_adapter_do_not_change() -> None:
    sites = [WeightSite(name=str(i), role="attn.q", path="qkv", d_out=2, d_in=1, rows=(i, i + 2)) for i in (1, 5)]
    y = torch.arange(16.0).reshape(2, 8)
    output = apply_by_rows(sites, [10, 100], y, -1, lambda factor, part: factor * part)
    expected = y * torch.tensor([1, 10, 10, 1, 1, 100, 100, 1])
    assert torch.equal(output, expected)
    assert torch.equal(apply_by_rows(sites, [10, 100], y.T, 0, lambda factor, part: factor * part), expected.T)


def test_inputs_take_the_adapters_dtype_but_ids_and_autocast_do_not() -> None:
    layer = torch.nn.Linear(1, 1).double()
    assert cast(torch.ones(1), layer).dtype == torch.float64
    assert cast(torch.ones(1, dtype=torch.long), layer).dtype == torch.long
    with torch.autocast("cpu", torch.bfloat16):
        assert cast(torch.ones(1), layer).dtype == torch.float32


def test_the_tensor_is_found_in_arguments_and_outputs() -> None:
    x = torch.ones(1)
    assert (
        first_argument((x, 2), {})
        is first_argument((), {"hidden_states": x, "mask": 2})
        is main_output((x, None))
        is main_output(x)
        is x
    )


def test_the_base_tensor_is_the_hosts_own_also_under_a_parametrisation() -> None:
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Softplus())
    assert base_tensor(torch.nn.Sequential(layer), "0", "weight") is weight
