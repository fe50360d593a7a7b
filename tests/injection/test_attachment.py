"""Attach, detach, scale and enable, bitwise."""

import copy

import pytest
import torch
from torch import nn

from tests.injection.toy import Add, Net, ToyHost, net, run, stir
from tests.raising import raises
from veneer.injection import DeadSite, HostChanged, StateError, UnsupportedSite, attach, attachments, hosts
from veneer.injection.errors import SelectionError, UnknownName
from veneer.testing.snapshot import assert_same, snapshot

WHERE = "embed.token conv attn.{q,v,out} head"


def train_once(model: nn.Module) -> None:
    """One step in training mode: gradients, BatchNorm statistics."""
    model.train()
    model(**ToyHost().sample(model)).square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
                p.grad = None
    model.eval()


def test_detach_restores_the_host_bitwise_after_training() -> None:
    model = net()
    model.head.bias.requires_grad_(False)
    before, output = snapshot(model), run(model)
    tuned = attach(model, "lora", where="embed.token conv attn.{q,v,out}", rank=2, train="norm head")
    train_once(model)
    assert not torch.equal(run(model), output)
    assert not torch.equal(model.norm.running_mean, net().norm.running_mean)
    tuned.detach()
    assert_same(before, snapshot(model), "detach")
    assert torch.equal(run(model), output)
    assert attachments(model) == []


@pytest.mark.parametrize("first", [0, 1])
def test_two_attachments_detach_in_any_order(first: int) -> None:
    model = net()
    before = snapshot(model)
    both = [attach(model, "lora", where=WHERE, rank=2, name=name) for name in "ab"]
    assert [a.name for a in attachments(model)] == ["a", "b"]
    for tuned in both:
        stir(tuned)
    both[first].detach()
    alone = net()
    other = attach(alone, "lora", where=WHERE, rank=2)
    other.load_state_dict(both[1 - first].state_dict())
    assert torch.equal(run(model), run(alone))
    both[1 - first].detach()
    assert_same(before, snapshot(model), "detach")


@pytest.mark.parametrize("first", [0, 1])
def test_two_attachments_that_train_the_same_head_detach_in_any_order(first: int) -> None:
    model = net()
    before = snapshot(model)
    both = []
    for name in "ab":
        both.append(attach(model, "lora", where="attn.q", rank=2, name=name, train="head"))
        train_once(model)
    trained = model.head.weight.detach().clone()
    both[first].detach()
    assert torch.equal(model.head.weight, trained)
    assert model.head.weight.requires_grad
    both[1 - first].detach()
    assert_same(before, snapshot(model), "detach")


def test_detach_freezes_the_trained_parameters_beside_another_attachment() -> None:
    model = net()
    attach(model, "lora", where="attn.q", rank=2)
    trains = attach(model, "lora", where="attn.v", rank=2, train="head")
    assert model.head.weight.requires_grad
    trains.detach()
    assert not model.head.weight.requires_grad


FAILURES = [
    (Add(fails_at="inner.branch"), {"where": "attn.v inner"}, RuntimeError),
    (Add(), {"where": "name:inner.branch name:tail.branch"}, UnsupportedSite),
    ("lora", {"where": "attn.q attn.out mlp.in", "sample": True, "rank": 2, "train": "head"}, DeadSite),
    ("lora", {"where": "attn.q", "sample": {"ids": "no tensor"}, "rank": 2}, TypeError),
    ("lora", {"where": "nothing", "rank": 2}, SelectionError),
    ("fact", {"where": "conv"}, UnsupportedSite),
    ("lora", {"where": "attn.q", "train": "attn.q", "rank": 2}, SelectionError),
    ("lora", {"where": "head", "train": "head", "rank": 2}, SelectionError),
    ("lora", {"where": "attn.q", "name": "taken", "rank": 2}, StateError),
    ("lora", {"where": "attn.q", "name": "a b", "rank": 2}, SelectionError),
    ("lora", {"rank": 3, "no_such_option": 1}, TypeError),
    ("laro", {}, UnknownName),
]


@pytest.mark.parametrize(("method", "options", "error"), FAILURES)
@pytest.mark.parametrize("other_attached", [False, True])
def test_a_failed_attach_leaves_no_trace(method: object, options: dict, error: type, other_attached: bool) -> None:
    model = net()
    if other_attached or options.get("name") == "taken":
        attach(model, "lora", where="attn.q attn.out", rank=2, name="taken")
    before, output = snapshot(model), run(model)
    with pytest.raises(error):
        attach(model, method, **options)
    assert_same(before, snapshot(model), "a failed attach")
    assert torch.equal(run(model), output)


def test_only_adapters_and_parameters_in_train_require_gradients() -> None:
    model = net()
    tuned = attach(model, "lora", where="attn.{q,out}", rank=2, train="head")
    expected = {id(p) for p in tuned.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected
    assert {n for n, _ in tuned.named_parameters()} == {
        "qkv.q:down", "qkv.q:up", "read:down", "read:up", "head:weight", "head:bias",
    }  # fmt: skip


def test_strength_is_written_into_buffers_and_blends() -> None:
    model = net()
    host = run(model)
    tuned = attach(model, "lora", where=WHERE, rank=2)
    stir(tuned)
    adapted = run(model)
    buffers = [adapter.strength for _, adapter in tuned.parts.values()]
    for value in (0.0, 0.5, 1.0):
        tuned.scale = value
        assert all(
            adapter.strength is b and b.item() == value for (_, adapter), b in zip(tuned.parts.values(), buffers, strict=True)
        )
        if value in (0, 1):
            assert torch.equal(run(model), adapted if value else host)
    tuned.scale = 0.5
    with tuned.enabled(False):
        assert torch.equal(run(model), host)
    with pytest.raises(ZeroDivisionError), tuned.enabled(False):
        raise ZeroDivisionError
    assert buffers[0].item() == tuned.scale == 0.5


def test_a_copy_is_independent() -> None:
    model = net()
    tuned = attach(model, "lora", where=WHERE, rank=2, train="norm")
    stir(tuned)
    output = run(model)
    twin = copy.deepcopy(model)
    (other,) = attachments(twin)
    assert torch.equal(run(twin), output)
    stir(other)
    assert torch.equal(run(model), output)
    assert not torch.equal(run(twin), output)
    other.detach()
    assert_same_values(twin, net())
    assert torch.equal(run(model), output)
    tuned.check()


def assert_same_values(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())
    assert torch.equal(run(a), run(b))


def test_attach_after_compile_is_refused() -> None:
    whole, inside, part = net(), net(), net()
    inside.compile(backend="eager")
    part.tail = torch.compile(part.tail, backend="eager")
    for model, where in ((torch.compile(whole, backend="eager"), "Net"), (inside, "Net"), (part, "tail")):
        with raises(HostChanged, where=where, given="torch.compile"):
            attach(model, "lora", where="attn.q", rank=2)


def fuse(model: Net) -> None:
    model.fused = True


def replace(model: Net) -> None:
    model.qkv = nn.Linear(6, 18)


def replace_read(model: Net) -> None:
    model.read = nn.Linear(6, 6)


def new_head(model: Net) -> None:
    model.head = nn.Linear(6, 3)


def wider_head(model: Net) -> None:
    model.head = nn.Linear(6, 5)


@pytest.mark.parametrize(
    ("change", "where", "given"),
    [
        (fuse, "qkv.q", "fused"),
        (replace, "qkv.q", "replaced"),
        (replace_read, "read", "replaced"),
        (new_head, "head:weight", "rebuilt"),
        (wider_head, "head:weight", "rebuilt"),
    ],
)
def test_a_host_that_fuses_or_rebuilds_after_attach_is_caught(change: object, where: str, given: str) -> None:
    model = net()
    tuned = attach(model, "lora", where="attn.{q,out}", rank=2, train="head")
    run(model)
    change(model)
    for call in (lambda: run(model), tuned.check, tuned.merge):
        with raises(HostChanged, where=where, given=given):
            call()


def test_unmerged_adapters_get_the_training_mode_of_the_host() -> None:
    model = net()
    tuned = attach(model, "lora", where="attn.{q,out}", rank=2, dropout=0.9)
    stir(tuned)
    assert torch.equal(run(model), run(model))
    tuned.merge()
    model.train()
    tuned.unmerge()
    assert all(adapter.training for _, adapter in tuned.parts.values())


def test_names_count_up() -> None:
    model = net()
    names = [attach(model, "lora", where="attn.q", rank=2).name for _ in range(3)]
    assert names == ["lora", "lora_2", "lora_3"]


def test_calls_that_do_not_fit_the_state_are_refused() -> None:
    model = net()
    tuned = attach(model, "lora", where="attn.q", rank=2)
    with raises(StateError, where="lora", given="not merged"):
        tuned.unmerge()
    tuned.merge()
    for call in (tuned.merge, tuned.detach, lambda: setattr(tuned, "scale", 0.5), lambda: tuned.enabled(False).__enter__()):
        with raises(StateError, where="lora", given="merged"):
            call()
    tuned.unmerge()
    tuned.detach()
    for call in (tuned.detach, tuned.check):
        with raises(StateError, where="lora", given="detached"):
            call()


def test_a_config_with_further_options_is_rejected() -> None:
    with pytest.raises(TypeError, match=r"\['rank'\]"):
        attach(net(), Add(), rank=3)


def test_a_model_without_a_host_is_refused() -> None:
    with raises(UnsupportedSite, given="Linear", supported_hosts=tuple(hosts.names())):
        attach(nn.Linear(2, 2), "lora")
    with pytest.raises(TypeError, match=r"^int "):
        attach(3, "lora")
    assert "toy" in hosts.names()


def test_new_adapters_get_the_training_mode_of_the_host() -> None:
    """An adapter's dropout is disabled on a host in evaluation mode."""
    for training in (True, False):
        attached = attach(net().train(training), "lora", where=WHERE, rank=2, dropout=0.5)
        assert {adapter.training for _, adapter in attached.parts.values()} == {training}
