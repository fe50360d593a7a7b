"""From models and pipelines to towers and names."""

from types import SimpleNamespace

import pytest
import torch

from tests.injection.toy import ToyHost, net, run, stir
from tests.raising import raises
from veneer.injection import UnsupportedSite, VeneerError, attach, attachments, hosts, sites
from veneer.injection.towers import towers_of


class SideHost(ToyHost):
    """The toy host in the part of a text encoder: not the main tower."""

    name = "side"
    tower = "text"
    main = False

    def matches(self, model: torch.nn.Module) -> bool:
        return getattr(model, "side", False)


@pytest.fixture
def pipe():
    class Main(ToyHost):
        def matches(self, model: torch.nn.Module) -> bool:
            return super().matches(model) and not getattr(model, "side", False)

    hosts.unregister("toy")
    hosts.register(Main)
    hosts.register(SideHost)
    models = {"text_encoder": net(), "unet": net(), "text_encoder_2": net(), "tokenizer": object(), "vae": torch.nn.Linear(1, 1)}
    for name in ("text_encoder", "text_encoder_2"):
        models[name].side = True
    yield SimpleNamespace(components=models)
    hosts.unregister("side")


def test_a_pipeline_gives_its_main_tower_first_and_names_from_its_own_view(pipe: SimpleNamespace) -> None:
    towers = towers_of(pipe)
    assert [(t.component, t.main) for t in towers] == [("unet", True), ("text_encoder", False), ("text_encoder_2", False)]
    names = {(s.tower, s.name) for s in sites(pipe) if s.role == "attn.q"}
    assert names == {("toy", "unet.qkv.q"), ("text", "text_encoder.qkv.q"), ("text_2", "text_encoder_2.qkv.q")}
    assert {s.guard_key for s in sites(pipe) if s.role == "attn.q" and s.tower == "text"} == {"text_encoder.fused"}


def test_a_pattern_without_a_tower_means_the_main_one(pipe: SimpleNamespace) -> None:
    assert list(attach(pipe, "lora", where="attn.q", rank=2).towers) == ["unet"]
    both = attach(pipe, "lora", where="attn.q text_2/attn.v", rank=2)
    assert list(both.parts) == ["unet.qkv.q", "text_encoder_2.qkv.v"]
    assert attachments(pipe) == [*attachments(pipe.components["unet"])]
    assert attachments(pipe.components["text_encoder_2"]) == [both]


def test_one_attachment_on_two_towers_comes_and_goes_as_one(pipe: SimpleNamespace) -> None:
    both = attach(pipe, "lora", where="*/attn.out", rank=2, train="text/head")
    stir(both)
    towers = [pipe.components[c] for c in ("unet", "text_encoder", "text_encoder_2")]
    assert all(not torch.equal(run(t), run(net())) for t in towers)
    both.merge()
    both.unmerge()
    both.detach()
    assert all(torch.equal(run(t), run(net())) for t in towers)


def test_in_a_bare_model_every_tower_is_meant(pipe: SimpleNamespace) -> None:
    tuned = attach(pipe.components["text_encoder"], "lora", where="attn.q", rank=2)
    assert list(tuned.parts) == ["qkv.q"]


def test_a_compiled_model_still_shows_what_was_attached_before() -> None:
    model = net()
    tuned = attach(model, "lora", where="attn.q", rank=2)
    compiled = torch.compile(model, backend="eager")
    assert attachments(compiled) == [tuned]
    assert [s.name for s in sites(compiled)] == [s.name for s in sites(model)]


def test_nothing_known_is_an_error_that_lists_the_hosts() -> None:
    with raises(UnsupportedSite, given="SimpleNamespace", supported_hosts=tuple(hosts.names())):
        towers_of(SimpleNamespace(components={"vae": torch.nn.Linear(1, 1)}))
    assert towers_of(torch.nn.Linear(1, 1), strict=False) == []


def test_a_host_that_names_two_sites_alike_is_refused() -> None:
    class Twice(ToyHost):
        def sites(self, *args: object) -> object:
            yield from super().sites(*args)
            yield next(super().sites(*args))

    hosts.unregister("toy")
    hosts.register(Twice)
    with raises(VeneerError, where="toy", given=("table",)):
        sites(net())


def test_the_table_says_what_there_is() -> None:
    text = str(sites(net()))
    assert text.splitlines()[0].split() == ["tower", "role", "type", "sites", "blocks", "size"]
    assert any(line.split() == ["toy", "attn.q", "WeightSite", "1", "1", "6×6"] for line in text.splitlines())
    assert any(line.split() == ["toy", "conv", "WeightSite", "1", "0", "6×1×3×3"] for line in text.splitlines())
