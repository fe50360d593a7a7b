"""Each seam against the host with explicitly changed tensors."""

import copy

import torch
from torch import nn

from tests.injection.toy import Add, Net, net, run, stir
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.seams.call_seam import CallSeam
from veneer.injection.seams.weight_seam import WeightSeam
from veneer.methods.selective.tensors.bitfit import BitFit


def output_with(model: Net, path: str, param: str, delta: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """The output with a delta added to one tensor of a copy."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_submodule(path).get_parameter(param)[rows] += delta
    return run(model)


def test_slices_of_a_fused_weight_change_their_own_rows() -> None:
    bare, model = net(), net()
    tuned = attach(model, "lora", where="attn.{q,v}", rank=2)
    stir(tuned)
    assert [type(s) for s in tuned.seams] == [CallSeam]
    _, q = tuned.parts["qkv.q"]
    _, v = tuned.parts["qkv.v"]
    delta = torch.zeros(18, 6)
    delta[0:6], delta[12:18] = q.up @ q.down, v.up @ v.down
    torch.testing.assert_close(run(model), output_with(bare, "qkv", "weight", delta))


def test_a_weight_that_is_read_is_parametrized() -> None:
    bare, model = net(), net()
    tuned = attach(model, "lora", where="attn.out", rank=2)
    stir(tuned)
    assert [type(s) for s in tuned.seams] == [WeightSeam]
    _, adapter = tuned.parts["read"]
    expected = output_with(bare, "read", "weight", adapter.up @ adapter.down)
    torch.testing.assert_close(run(model), expected)
    assert (expected - run(bare)).abs().max() > 0.01


def test_a_called_bias_is_changed_in_the_output_and_a_read_one_as_a_tensor() -> None:
    for name, path in (("conv.bias", "conv"), ("read.bias", "read")):
        bare, model = net(), net()
        tuned = attach(model, BitFit(), where=f"name:{name}")
        stir(tuned)
        _, adapter = tuned.parts[name]
        torch.testing.assert_close(run(model), output_with(bare, path, "bias", adapter.delta.detach()))


def test_a_branch_reads_one_module_and_writes_another() -> None:
    bare, model = net(), net()
    tuned = attach(model, Add())
    stir(tuned)
    _, adapter = tuned.parts["inner.branch"]
    inputs = {}
    bare.tail[0].register_forward_pre_hook(lambda m, args: inputs.update(x=args[0]))
    bare.tail[1].register_forward_hook(lambda m, args, y: y + adapter.inner(inputs["x"]))
    torch.testing.assert_close(run(model), run(bare))


def test_a_container_is_refused() -> None:
    with raises(UnsupportedSite, site="tail.branch", given="Sequential"):
        attach(net(), Add(), where="name:tail.branch")


def test_a_read_site_refuses_an_adapter_without_a_weight_form() -> None:
    class AddAnywhere(Add):
        needs = Add.needs + BitFit.needs

    with raises(UnsupportedSite, site="read.bias", expected="weight"):
        attach(net(), AddAnywhere(), where="name:read.bias")


def test_a_quantised_tensor_that_is_read_is_refused() -> None:
    model = net()
    model.read.weight = nn.Parameter(model.read.weight.to(torch.int8), requires_grad=False)
    with raises(UnsupportedSite, site="read", given=torch.int8):
        attach(model, "lora", where="attn.out", rank=2)


def test_the_host_keeps_its_keys_and_loads_its_own_checkpoints_while_attached() -> None:
    bare, model = net(), net()
    tuned = attach(model, "lora", where="conv attn.{q,k,v,out}", rank=2)
    stir(tuned)
    calls = attach(net(), "lora", where="conv attn.{q,k,v}", rank=2)
    assert list(next(iter(calls.towers.values())).state_dict()) == list(bare.state_dict())
    state = tuned.host_state_dict()
    assert list(state) == list(bare.state_dict())
    assert all(torch.equal(state[k], v) for k, v in bare.state_dict().items())
    next(iter(calls.towers.values())).load_state_dict(bare.state_dict(), strict=True)


def test_adapters_move_and_cast_with_the_host() -> None:
    model = net()
    tuned = attach(model, "lora", where="conv attn.{q,out}", rank=2)
    model.double()
    assert {p.dtype for p in tuned.parameters()} == {torch.float64}
    assert run(model).dtype == torch.float64


def test_a_half_precision_host_gets_adapters_in_single_precision() -> None:
    model = net().to(torch.bfloat16)
    tuned = attach(model, "lora", where="conv attn.{q,out}", rank=2)
    before = run(model)
    stir(tuned)
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    assert run(model).dtype == before.dtype == torch.bfloat16
    assert not torch.equal(run(model), before)


def test_seams_of_several_attachments_share_a_module() -> None:
    bare, model = net(), net()
    both = [attach(model, "lora", where=where, rank=2) for where in ("attn.q attn.out", "attn.{q,v} attn.out")]
    for tuned in both:
        stir(tuned)
    with torch.no_grad():
        for tuned in both:
            for site, adapter in tuned.parts.values():
                bare.get_submodule(site.path).weight[slice(*site.rows) if site.rows else ...] += adapter.up @ adapter.down
    torch.testing.assert_close(run(model), run(bare))
