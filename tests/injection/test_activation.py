"""`activate`: enabled attachments, restored scales, cost, and no recompilation."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.injection.toy import net, run, stir
from tests.raising import raises
from veneer.injection import StateError, UnknownName, activate, attach, hosts
from veneer.testing.pipelines import tiny_pipeline


def three_attachments() -> tuple[nn.Module, list[Any]]:
    model = net()
    torch.manual_seed(0)
    attached = [
        attach(model, "lora", where="embed.token attn.{q,out} head", rank=2, name=name) for name in ("style", "face", "more")
    ]
    for factor, attachment in enumerate(attached, 1):
        stir(attachment, 0.2 * factor)
    return model, attached


def output_of(index: int, scale: float = 1.0) -> Tensor:
    model, attached = three_attachments()
    attached[index].scale = scale
    for other in attached[:index] + attached[index + 1 :]:
        other.detach()
    return run(model)


def test_only_the_named_attachments_are_enabled() -> None:
    model, attached = three_attachments()
    all_enabled, base = run(model), run(net())
    activate(model, {"face": 0.5})
    assert torch.equal(run(model), output_of(1, 0.5))
    activate(model, ["face"])
    assert torch.equal(run(model), output_of(1, 0.5))  # keeps its scale
    activate(model, "style")
    assert torch.equal(run(model), output_of(0))
    activate(model, ())
    assert torch.equal(run(model), base)
    activate(model, {"style": 1, "face": 1, "more": 1})
    assert torch.equal(run(model), all_enabled)
    assert [a.scale for a in attached] == [1, 1, 1]


def test_the_context_restores_the_previous_scales() -> None:
    model, attached = three_attachments()
    attached[2].scale = 0.3
    before = run(model)
    with activate(model, {"style": 0.8}):
        assert torch.equal(run(model), output_of(0, 0.8))
        with activate(model, "face"), attached[1].enabled(False):
            assert torch.equal(run(model), run(net()))
        assert torch.equal(run(model), output_of(0, 0.8))
    assert torch.equal(run(model), before)
    with pytest.raises(ZeroDivisionError), activate(model, "style"):
        raise ZeroDivisionError
    assert torch.equal(run(model), before)
    assert [a.scale for a in attached] == [1, 1, 0.3]
    activation = activate(model, ())
    activation.undo()
    attached[0].scale = 0.5
    activation.undo()
    assert attached[0].scale == 0.5


def test_an_invalid_name_changes_nothing() -> None:
    model, attached = three_attachments()
    before = run(model)
    with raises(UnknownName, name="stlye", kind="attachment", expected=("style", "face", "more")):
        activate(model, {"face": 0.5, "stlye": 1.0})
    with raises(UnknownName, name="style", expected=()):
        activate(net(), "style")
    assert torch.equal(run(model), before)
    attached[0].merge()
    with raises(StateError, where="style", given="merged"):
        activate(model, {"face": 0.5, "style": 1.0})
    activate(model, "more")
    assert [a.is_enabled for a in attached] == [True, False, True]  # a merged attachment is part of the base model


def test_an_unsupported_scale_changes_nothing() -> None:
    import timm

    model = timm.create_model("test_vit", num_classes=3).eval()
    tuned = attach(model, "lora", where="attn", rank=2, name="style")
    attach(model, "vpt", tokens=2, name="prompts")
    with raises(StateError, given=0.5, expected=(0, 1)):
        activate(model, {"style": 0.25, "prompts": 0.5})
    assert {tuned.scale, *(adapter.strength.item() for _, adapter in tuned.parts.values())} == {1.0}


def test_disabled_adapters_do_not_run() -> None:
    model, attached = three_attachments()
    calls: list[str] = []
    for attachment in attached:
        for _, adapter in attachment.parts.values():
            for form in ("output", "weight"):
                adapter.__dict__[form] = _counted(calls, attachment.name, getattr(adapter, form))
    activate(model, "face")
    run(model)
    assert set(calls) == {"face"}
    assert len(calls) == len(attached[1].parts)


def _counted(calls: list[str], name: str, form: Any) -> Any:
    def counted(*tensors: Tensor) -> Tensor:
        calls.append(name)
        return form(*tensors)

    return counted


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_a_trace_of_a_disabled_attachment_includes_the_adapters() -> None:
    model = net()
    tuned = attach(model, "lora", where="head", rank=2)
    stir(tuned)
    inputs = tuple({"ids": torch.arange(8).reshape(2, 4) % 7, "image": torch.ones(2, 2, 4, 4)}.values())
    on = model(*inputs)
    with tuned.enabled(False):
        traced = torch.jit.trace(model, inputs, check_trace=False)
        off = model(*inputs)
        assert torch.equal(traced(*inputs), off)
    assert not torch.equal(on, off)
    torch.testing.assert_close(traced(*inputs), on)


@pytest.mark.parametrize(("method", "component"), [("lora", "unet"), ("lokr", "text_encoder"), ("oft", "text_encoder")])
def test_a_compiled_tower_is_compiled_once(method: str, component: str) -> None:
    """Scales and enabled states are buffers of a single graph, whose outputs equal those of eager mode."""
    tower = tiny_pipeline("sd").components[component]
    where = "attn" if component == "text_encoder" else ("unet.mid/attn", "unet.mid/xattn")
    attached = [attach(tower, method, where=where, name=name) for name in ("style", "face")]
    for factor, attachment in enumerate(attached, 1):
        stir(attachment, 0.1 * factor)
    (host,) = [h for h in (hosts.get(n)() for n in hosts.names()) if h.matches(tower)]
    inputs = host.sample(tower)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(tower, fullgraph=True, backend=backend)
    outputs = []
    stack = contextlib.ExitStack()
    for switch in (
        lambda: None,
        lambda: activate(tower, {"style": 0.8}),
        lambda: activate(tower, {"style": 0.1, "face": 0.5}),
        lambda: activate(tower, ()),
        lambda: setattr(attached[0], "scale", 0.3),
        lambda: activate(tower, "style"),
        lambda: stack.enter_context(attached[0].enabled(False)),
    ):
        switch()
        outputs.append(first(compiled, inputs))
        torch.testing.assert_close(outputs[-1], first(tower, inputs))
    assert len(graphs) == 1
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(outputs[:4]))
    assert torch.equal(outputs[-1], outputs[3])  # off
    stack.close()
    torch._dynamo.reset()


def first(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]
