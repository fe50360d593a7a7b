"""A dead site is an error that names it, and a probe changes nothing."""

import torch

from tests.injection.toy import ToyHost, net
from tests.raising import raises
from veneer.injection import DeadSite, StateError, attach, hosts
from veneer.testing.snapshot import assert_same, snapshot


def test_a_site_that_the_host_never_uses_is_named() -> None:
    tuned = attach(net(), "lora", where="attn.{q,out} mlp.in", rank=2)
    with raises(DeadSite, where="lora", given=("spare:down", "spare:up")):
        tuned.probe()


def test_live_sites_pass_although_a_fresh_lora_changes_nothing() -> None:
    tuned = attach(net(), "lora", where="embed.token conv attn.{q,k,v,out} head", rank=2, sample=True)
    tuned.probe(ToyHost().sample(net()))


def test_a_hook_on_a_module_that_is_only_read_is_dead() -> None:
    """The site that claims to be called where its tensor is read: wrapped, and never used."""

    class Wrong(ToyHost):
        def sites(self, *args: object) -> object:
            for site in super().sites(*args):
                if site.name == "read":
                    object.__setattr__(site, "called", True)
                yield site

    hosts.unregister("toy")
    hosts.register(Wrong)
    with raises(DeadSite, given=("read:down", "read:up")):
        attach(net(), "lora", where="attn.{q,out}", rank=2, sample=True)


def test_a_probe_puts_everything_back() -> None:
    model = net()
    tuned = attach(model, "lora", where="conv attn.q", rank=2)
    model.train()
    model.qkv.eval()
    before, state = snapshot(model), torch.random.get_rng_state()
    tuned.probe()
    assert_same(before, snapshot(model), "a probe")
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_probe_needs_adapters_that_are_on() -> None:
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
