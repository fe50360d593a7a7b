"""Models that `fully_shard` or tensor parallelism has sharded, in a group of one process.

Two processes: `tests/training/test_sharded_base.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tests.injection.toy import Net, ToyHost, net, run, stir
from tests.raising import raises
from veneer.formats import native
from veneer.injection import Attachment, HostChanged, attach, attachments
from veneer.injection.attachment.fingerprint import identity


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a block and the model around it, adapters included."""
    fully_shard(model.tail, mesh=mesh)
    fully_shard(model, mesh=mesh)


def adapted(where: str, method: str = "lora") -> tuple[Net, Attachment]:
    model = net()
    torch.manual_seed(0)
    tuned = attach(model, method, where=where, rank=2)
    stir(tuned)
    return model, tuned


def test_attach_after_sharding_is_an_error(mesh: DeviceMesh) -> None:
    whole, part = net(), net()
    shard(whole, mesh)
    fully_shard(part.tail, mesh=mesh)
    for model, where in ((whole, "Net"), (part, "tail")):
        with raises(HostChanged, where=where, given="sharding", expected="attach first"):
            attach(model, "lora", where="attn.q", rank=2)
        assert attachments(model) == []


def test_attach_after_tensor_parallelism_is_an_error(mesh: DeviceMesh) -> None:
    model = net()
    model.qkv.weight = nn.Parameter(distribute_tensor(model.qkv.weight.detach(), mesh, [Shard(0)]))
    with raises(HostChanged, where="qkv", given="sharding"):
        attach(model, "lora", where="attn.q", rank=2)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # nothing writes to the output in place
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_attached_before_sharding_work(mesh: DeviceMesh, method: str) -> None:
    """Of weights that are called, and of one that is read: outputs and gradients of the model that is not sharded."""
    (plain, expected), (model, tuned) = adapted("attn.{q,out}", method), adapted("attn.{q,out}", method)
    shard(model, mesh)
    for each in (plain, model):
        each.zero_grad()
        run_with_gradients(each).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in expected.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == gradients.keys()
    for name, parameter in tuned.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name])
    assert torch.equal(run(model), run(plain))


def run_with_gradients(model: nn.Module) -> torch.Tensor:
    with torch.enable_grad():
        return model(**ToyHost().sample(model))


def test_a_sharded_model_has_the_identity_of_its_base(mesh: DeviceMesh) -> None:
    (plain, _), (model, tuned) = adapted("attn.q"), adapted("attn.q")
    shard(model, mesh)
    assert identity(model) == identity(plain)
    assert identity(model)["class"] == "Net"
    assert tuned.state_dict().keys() == {f"qkv.q:{name}" for name in ("down", "up")}


def test_files_of_a_sharded_model_are_those_of_the_model(mesh: DeviceMesh, tmp_path: object) -> None:
    (_, expected), (model, tuned) = adapted("attn.{q,out}"), adapted("attn.{q,out}")
    shard(model, mesh)
    files = [native.save(each, f"{tmp_path}/{name}") for name, each in (("plain", expected), ("sharded", tuned))]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("where", ["attn.q", "attn.out"])
def test_merging_a_sharded_model_is_an_error(mesh: DeviceMesh, where: str) -> None:
    model, tuned = adapted(where)
    shard(model, mesh)
    before = run(model)
    with raises(HostChanged, where="Net", given="sharding", expected="merge before sharding"):
        tuned.merge()
    assert not tuned.merged
    assert torch.equal(run(model), before)


def test_unmerging_a_sharded_model_is_an_error(mesh: DeviceMesh) -> None:
    model, tuned = adapted("attn.q")
    tuned.merge()
    shard(model, mesh)
    with raises(HostChanged, where="Net", given="sharding", expected="unmerge before sharding"):
        tuned.unmerge()
    assert tuned.merged


def test_hooks_detach_from_a_sharded_model_and_parametrizations_do_not(mesh: DeviceMesh) -> None:
    model, tuned = adapted("attn.q")
    shard(model, mesh)
    tuned.detach()
    assert torch.equal(run(model), run(net()))
    model, tuned = adapted("attn.out")
    shard(model, mesh)
    before = run(model)
    with raises(HostChanged, where="Net", given="sharding", expected="detach before sharding"):
        tuned.detach()
    assert torch.equal(run(model), before)
