"""`probe`: dead sites are an error, and nothing is changed."""

import torch

from tests.injection.toy import ToyHost, net
from tests.raising import raises
from veneer.injection import DeadSite, StateError, attach, hosts
from veneer.testing.snapshot import assert_same, snapshot


def test_a_site_that_the_host_never_uses_is_named() -> None:
    tuned = attach(net(), "lora", where="attn.{q,out} mlp.in", rank=2)
    with raises(DeadSite, where="lora", given=("spare:down", "spare:up")):
        tuned.probe()


def test_used_sites_pass_with_zero_initialized_lora() -> None:
    tuned = attach(net(), "lora", where="embed.token conv attn.{q,k,v,out} head", rank=2, sample=True)
    tuned.probe(ToyHost().sample(net()))


def test_a_hook_on_a_module_that_is_only_read_is_dead() -> None:
    """A host that declares a read weight as called."""

    class WrongHost(ToyHost):
        def sites(self, *args: object) -> object:
            for site in super().sites(*args):
                if site.name == "read":
                    object.__setattr__(site, "called", True)
                yield site

    hosts.unregister("toy")
    hosts.register(WrongHost)
    with raises(DeadSite, given=("read:down", "read:up")):
        attach(net(), "lora", where="attn.{q,out}", rank=2, sample=True)


def test_a_probe_restores_the_model_and_the_random_state() -> None:
    model = net()
    tuned = attach(model, "lora", where="conv attn.q", rank=2)
    model.train()
    model.qkv.eval()
    before, state = snapshot(model), torch.random.get_rng_state()
    tuned.probe()
    assert_same(before, snapshot(model), "a probe")
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_probe_needs_enabled_adapters() -> None:
    tuned = attach(net(), "lora", where="attn.q", rank=2)
    with tuned.enabled(False), raises(StateError, given="disabled", expected="enabled"):
        tuned.probe()
    tuned.scale = 0
    with raises(StateError, given="scale 0", expected="enabled"):
        tuned.probe()
    tuned.scale = 1
    tuned.merge()
    with raises(StateError, given="merged", expected="enabled"):
        tuned.probe()
