"""Stack, Average and Parallel: values and gradients against blocks that are written out, files, and what is rejected."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from tests.methods.bottlenecks import blocks_written_out, picture, stirred, tiny
from tests.raising import raises
from veneer.formats._core.format import formats
from veneer.injection import Attachment, LoadError, OptionError, SaveError, StateError, UnknownName, UnsupportedSite, attach
from veneer.injection.composition.compose import compose, composition_of
from veneer.injection.composition.nodes import DEPTH, Average, Node, Parallel, Stack, node_from_json

NAMES = ("a", "b", "c")


def three(methods: tuple[str, ...] = ("houlsby",) * 3, **options: Any) -> tuple[Any, dict[str, Attachment]]:
    """A ViT with three trained adapters, after the MLPs if they are bottlenecks."""
    model = tiny()
    where = [None if m == "vpt" else "mlp" for m in methods]
    attached = {n: attach(model, m, where=w, name=n, **options) for n, m, w in zip(NAMES, methods, where, strict=True)}
    for attachment in attached.values():
        stirred(attachment)
    for seed, attachment in enumerate(attached.values()):
        for p in attachment.parameters():
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.2)
    return model, attached


def written_out(attached: dict[str, Attachment], change: Any, x: Tensor) -> Tensor:
    """The bare model with `change(f, y)` for the output y of each MLP; f maps a name to y + Up(GELU(Down(y)))."""

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        def adapter(name: str) -> Any:
            t: Any = attached[name].parts[f"blocks.{depth}.mlp.branch"][1]
            strength = attached[name].scale
            return lambda y: y + strength * (torch.nn.functional.gelu(y @ t.down.T + t.down_bias) @ t.up.T + t.up_bias)

        x = x + b.ls1(b.attn(b.norm1(x)))
        return x + change(adapter, b.ls2(b.mlp(b.norm2(x))))

    return blocks_written_out(tiny(), block, x)


TREES: list[tuple[Node, Any]] = [
    (Stack("a", "b", "c"), lambda f, y: f("c")(f("b")(f("a")(y)))),
    (Average("a", "c"), lambda f, y: f("b")(f("a")(y) / 2 + f("c")(y) / 2)),
    (Stack("a", Average("b", "c", weights=(0.7, -0.4))), lambda f, y: _weighted(f, f("a")(y))),
    (Average(Stack("a", "b"), "c", weights=(0.3, 0.7)), lambda f, y: 0.3 * f("b")(f("a")(y)) + 0.7 * f("c")(y)),
]


def _weighted(f: Any, y: Tensor) -> Tensor:
    return y + 0.7 * (f("b")(y) - y) - 0.4 * (f("c")(y) - y)


@pytest.mark.parametrize(("node", "change"), TREES, ids=[str(node) for node, _ in TREES])
def test_nodes_equal_blocks_written_out(node: Node, change: Any) -> None:
    """Values and gradients of all parameters; b acts after the average of its neighbors, where it is not named."""
    model, attached = three(bottleneck=3)
    attached["c"].scale = 0.6
    before = model(picture())
    with compose(model, node) as composition:
        got, expected = model(picture()), written_out(attached, change, picture())
        torch.testing.assert_close(got, expected)
        parameters = [p for a in attached.values() for p in a.parameters()]
        for one, other in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (got, expected)), strict=True):
            torch.testing.assert_close(one, other)
        assert composition_of([*attached.values()]) is composition
    if not isinstance(node, Stack) or len(node.names) != len(node.children):
        assert (before - expected).abs().max() > 1e-3
    assert torch.equal(model(picture()), before)
    composition.undo()


def test_parallel_rows_equal_each_adapter_alone() -> None:
    """On low-rank updates of slices of a fused weight, and after an adapter that acts on all rows; layers may be shared."""
    model = tiny()
    first = attach(model, "houlsby", bottleneck=3, where="mlp@0", name="first")
    attached = [attach(model, "lora", where="attn@1", rank=2, name=name) for name in NAMES]
    for attachment in (first, *attached):
        stirred(attachment)
    for factor, attachment in enumerate(attached):
        for p in attachment.parameters():
            p.data.mul_(1 + factor)
    alone = []
    for names in (["a"], ["b", "c"]):
        with veneer.activate(model, ["first", *names]):
            alone.append(model(picture()))
    blocks: list[int] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.register_forward_hook(lambda module, args, output: blocks.append(len(output)))
    for shared in (False, True):
        blocks.clear()
        with compose(model, Stack("first", Parallel("a", Stack("b", "c"), shared_layers=shared))):
            torch.testing.assert_close(model(picture()), torch.cat(alone))
        assert blocks == [2 if shared else 4, 4]
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_disabled_and_swapped_attachments(tmp_path: Path) -> None:
    model, attached = three(bottleneck=3)
    other = attached["c"].save(tmp_path / "other")
    with compose(model, Average(*NAMES)):
        with attached["b"].enabled(False):
            expected = written_out(attached, lambda f, y: y + (f("a")(y) + f("c")(y) - 2 * y) / 3, picture())
            torch.testing.assert_close(model(picture()), expected)
        attached["a"].swap(other)
        expected = written_out(attached, lambda f, y: y + (2 * f("c")(y) + f("b")(y) - 3 * y) / 3, picture())
        torch.testing.assert_close(model(picture()), expected)


def test_a_copy_of_the_model_has_its_own_composition() -> None:
    model, _ = three(bottleneck=3)
    with torch.no_grad():
        with compose(model, Average(*NAMES)):
            expected, twin = model(picture()), copy.deepcopy(model)
        assert torch.equal(twin(picture()), expected)
        assert not torch.equal(model(picture()), expected)


def test_a_file_has_the_tree(tmp_path: Path) -> None:
    model, attached = three(bottleneck=3)
    node = Stack("a", Average("b", "c", weights=(0.7, -0.4)))
    with compose(model, node):
        expected = model(picture())
        saved = veneer.formats.native.save([*attached.values()], tmp_path / "composed")
        with raises(SaveError, file=str(tmp_path / "two.safetensors"), where="a", expected=("a",)):
            veneer.formats.native.save([attached["b"], attached["c"]], tmp_path / "two")
        alone = attached["b"].save(tmp_path / "alone")
    twin = tiny()
    loaded = veneer.load_all(twin, saved)
    assert torch.equal(twin(picture()), expected)
    found = composition_of(loaded)
    assert found is not None
    assert found.node == node
    again = veneer.load_all(twin, saved, name="second")
    assert composition_of(again).node.names == tuple(f"second-{n}" for n in NAMES)
    for attachment in (*again, loaded[1]):
        attachment.detach()
    assert composition_of([loaded[0], loaded[2]]) is None
    assert composition_of([veneer.load(tiny(), alone)]) is None


def test_a_file_of_two_compositions_stacks_them(tmp_path: Path) -> None:
    """Those of adapters that were attached one after the other; others overlap."""
    model, attached = three(bottleneck=3)
    attached["d"] = attach(model, "houlsby", where="mlp", name="d", bottleneck=3)
    stirred(attached["d"])
    both = [*attached.values()]
    with compose(model, Average("a", "b")), compose(model, Average("c", "d", weights=(0.3, 0.4))):
        expected = model(picture())
        saved = veneer.formats.native.save(both, tmp_path / "both")
    twin = tiny()
    found = composition_of(veneer.load_all(twin, saved))
    assert torch.equal(twin(picture()), expected)
    assert found is not None
    assert found.node == Stack(Average("a", "b"), Average("c", "d", weights=(0.3, 0.4)))
    with (
        compose(model, Average("a", "c")),
        compose(model, Average("b", "d")),
        raises(SaveError, where="composition", given=("a", "c", "b", "d")),
    ):
        veneer.formats.native.save(both, tmp_path / "overlap")


def test_other_formats_have_no_nodes(tmp_path: Path) -> None:
    """Adapters of different layers could be saved, but would be loaded without the weights of the average."""
    model = tiny()
    save = formats.get("lycoris")().save
    attached = [attach(model, "lora", where=f"attn.v@{i}", rank=2, name=name) for i, name in enumerate("ab")]
    with compose(model, Average("a", "b")):
        with raises(SaveError, where="composition", given="lycoris", expected="native"):
            save(attached, tmp_path / "both")
        assert not list(tmp_path.iterdir())
        save(attached[0], tmp_path / "one")
    save(attached, tmp_path / "both")


def test_trained_base_parameters_have_no_node() -> None:
    model, _ = three(bottleneck=3)
    attach(model, "houlsby", where="mlp", name="d", bottleneck=3, train=["norm"])
    for node in (Average("a", "d"), Parallel("a", "d")):
        with raises(UnsupportedSite, where="d", expected=()):
            compose(model, node)
    compose(model, Stack("a", "d")).undo()


@pytest.mark.parametrize(
    "header",
    [
        {"average": ["a", "x"]}, {"mean": ["a", "b"]}, {"average": ["a", 3]}, {"average": ["a", "b"], "weights": [1]}, 5,
        {"stack": ["a", "b"], "rate": 1}, {"stack": ["a", "a"]},
    ],
)  # fmt: skip
def test_bad_trees_in_files(header: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, attached = three(bottleneck=3)
    composition = compose(model, Average("a", "b", "c"))
    monkeypatch.setattr(composition.node, "to_json", lambda: header)
    saved = veneer.formats.native.save([*attached.values()], tmp_path / "bad")
    twin = tiny()
    with raises(LoadError, file=str(saved), where="composition"):
        veneer.load_all(twin, saved)
    assert veneer.attachments(twin) == []


def test_trees_as_json() -> None:
    node = Stack("a", Parallel(Average("b", "c", weights=(0.25, 0.75)), "d", shared_layers=True))
    assert node_from_json(node.to_json()) == node
    assert node_from_json(node.to_json()) != node.rename({"a": "z"})
    deep: Any = {"stack": ["a", "b"]}
    for i in range(DEPTH):
        deep = {"stack": [deep, f"n{i}"]}
    with raises(OptionError, option="node"):
        node_from_json(deep)


def test_what_is_rejected() -> None:
    model, attached = three(bottleneck=3)
    with raises(UnknownName, name="x", expected=NAMES):
        compose(model, Average("a", "x"))
    with raises(OptionError, option="children", method="stack", given=("b", "a"), expected=("a", "b")):
        compose(model, Average(Stack("b", "a"), "c"))
    with raises(OptionError, option="node", given="Average(Parallel('a', 'b', shared_layers=False), 'c', weights=[0.5, 0.5])"):
        compose(model, Average(Parallel("a", "b"), "c"))
    for bad in (lambda: Stack("a"), lambda: Average("a", "a"), lambda: Average("a", Stack("a", "b"))):
        with raises(OptionError, option="children"):
            bad()
    with raises(OptionError, option="weights", given=(1.0,)):
        Average("a", "b", weights=(1.0,))
    composition = compose(model, Average("a", "b"))
    with raises(StateError, where="a", given="composed"):
        compose(model, Stack("a", "c"))
    with raises(StateError, where="a", given="composed"):
        attached["a"].merge()
    with raises(StateError, where="a", given="composed"), veneer.mixed(model, ["a", "b"]):
        pass
    composition.undo()
    with veneer.mixed(model, ["a", "b"]), raises(StateError, where="a", given="mixed"):
        compose(model, Average("a", "b"))
    assert composition_of([*attached.values()]) is None


def test_adapters_that_cannot_be_averaged() -> None:
    """Other inputs for the same tensor, inserted tokens, and a weight that a later adapter changes."""
    model, attached = three(("houlsby", "adaptformer", "vpt"))
    with raises(UnsupportedSite, where="b", site="blocks.0.mlp.branch"):
        compose(model, Average("a", "b"))
    with raises(UnsupportedSite, where="c", given="TokenSeam"):
        compose(model, Parallel("a", "c"))
    compose(model, Parallel("a", "b")).undo()
    with raises(OptionError, option="node", given="parallel"):
        compose(SimpleNamespace(components={"": model}), Parallel("a", "b"))
    for attachment in attached.values():
        attachment.detach()
    for name in ("a", "b"):
        attach(model, "ia3", where="attn.v", name=name)
    compose(model, Average("a", "b"))
    with raises(UnsupportedSite, where="later", given="composed"):
        attach(model, "oft", where="attn.v", name="later", block_size=2)
    assert [a.name for a in veneer.attachments(model)] == ["a", "b"]


def test_shared_layers_need_blocks() -> None:
    model = tiny()
    for name in ("a", "b"):
        attach(model, "lora", where="conv.patch", rank=2, name=name)
    with raises(OptionError, option="shared_layers", method="parallel"):
        compose(model, Parallel("a", "b", shared_layers=True))
