"""Adapter files without their model: composed in one file, averaged (AdapterSoup), and averaged with aligned neurons (MerA)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from veneer.pipelines.merge import MergeConfig, merge, select_evenly

import veneer
from tests.methods.bottlenecks import picture, stirred, tiny
from tests.raising import raises
from veneer.adapter_merging.composed_file import compose_files
from veneer.adapter_merging.delta_weights import CombineError
from veneer.adapter_merging.domain_selection import select_adapters
from veneer.adapter_merging.neuron_alignment import align, record_activations, squared_distances, transport_plan
from veneer.adapter_merging.parameter_average import average_files
from veneer.cli import main
from veneer.formats._core.stored_adapters import read_stored
from veneer.injection import Attachment, LoadError, OptionError, SaveError, attach
from veneer.injection.composition.compose import compose, composition_of
from veneer.injection.composition.nodes import Average, Parallel, Stack


def saved(folder: Path, name: str, method: str = "houlsby", seed: int = 0, head: bool = False, **options: Any) -> Path:
    """A file of an adapter with random tensors, and of a head."""
    options = {"where": "mlp", "bottleneck": 3, **options} if method == "houlsby" else options
    model = tiny()
    attached = [attach(model, method, **options), *([attach(model, "linear_probe")] if head else [])]
    for attachment in attached:
        for p in attachment.parameters():
            p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.3)
    return veneer.formats.native.save(attached, folder / name)


def by_hand(paths: list[Path], node: Any) -> Tensor:
    """The output of the model with the adapters of the files, named `a0`, `a1`, … and composed."""
    model = tiny()
    for i, path in enumerate(paths):
        veneer.load_all(model, path, name=f"a{i}", heads=i == len(paths) - 1)
    with compose(model, node), torch.no_grad():
        output: Tensor = model(picture())
        return output


@pytest.mark.parametrize(
    ("node", "weights", "tree"),
    [
        ("stack", None, Stack("a0", "a1-houlsby")),
        ("average", (0.7, -0.2), Average("a0", "a1-houlsby", weights=(0.7, -0.2))),
        ("parallel", None, Parallel("a0", "a1-houlsby")),
    ],
)
def test_a_file_with_a_node(node: str, weights: Any, tree: Any, tmp_path: Path) -> None:
    """Adapters are named by their files; the second file has a head, the first one's head is not kept."""
    paths = [saved(tmp_path, "sketch 1", seed=1, head=False), saved(tmp_path, "photo", seed=2, head=True)]
    out, found = compose_files(paths, tmp_path / "both", node, weights)
    assert found == type(found)("sketch_1", "photo", **found.options())
    model = tiny()
    loaded = veneer.load_all(model, out)
    assert [a.name for a in loaded] == ["sketch_1", "photo", "photo-linear_probe"]
    with torch.no_grad():
        assert torch.equal(model(picture()), by_hand(paths, tree))
    with raises(SaveError, file=str(out)):
        compose_files(paths, tmp_path / "both", node, weights)


def test_files_of_files(tmp_path: Path) -> None:
    """A composed file is one child of another node; heads before the last file are dropped."""
    paths = [saved(tmp_path, name, seed=i, head=True) for i, name in enumerate("xyz")]
    pair, _ = compose_files(paths[:2], tmp_path / "pair", "average")
    out, tree = compose_files([pair, paths[2]], tmp_path / "all", "stack")
    assert tree == Stack(Average("pair-x", "pair-y"), "z")
    model = tiny()
    found = composition_of(veneer.load_all(model, out))
    assert found is not None
    assert found.node == tree
    assert [a.name for a in veneer.attachments(model)] == ["pair-x", "pair-y", "z", "z-linear_probe"]


def test_heads_of_other_classes_are_dropped(tmp_path: Path) -> None:
    """The adapters of a file with a head and of one without have the mean of the adapters alone."""
    paths = [saved(tmp_path, name, seed=i, head=i == 0) for i, name in enumerate("xy")]
    with raises(CombineError, file=str(paths[1]), where="method"):
        average_files(paths, tmp_path / "soup")
    merge(MergeConfig(tuple(paths), method="parameters", heads="drop", out=tmp_path / "soup"))
    [soup], (first, _), [second] = (read_stored(path) for path in (tmp_path / "soup.safetensors", *paths))
    for key, tensor in soup.tensors.items():
        torch.testing.assert_close(tensor, (first.tensors[key] + second.tensors[key]) / 2)
    assert [a.method.name for a in veneer.load_all(tiny(), tmp_path / "soup.safetensors")] == ["houlsby"]
    head = veneer.formats.native.save(attach(tiny(), "linear_probe"), tmp_path / "head")
    with raises(CombineError, file=str(head), where="heads", expected="an adapter"):
        average_files([paths[0], head], tmp_path / "none", heads=False)
    with raises(OptionError, option="heads", given="drop"):
        merge(MergeConfig(tuple(paths), heads="drop", out=tmp_path / "none"))


@pytest.mark.parametrize("weights", [None, (2.0, 0.0, 1.0)])
def test_the_mean_of_parameters(weights: Any, tmp_path: Path) -> None:
    paths = [saved(tmp_path, name, seed=i, head=True) for i, name in enumerate("xyz")]
    out = average_files(paths, tmp_path / "soup", weights)
    stored, soup = [read_stored(path) for path in paths], read_stored(out)
    numbers = [w / 3 for w in weights or (1, 1, 1)]
    for index, adapter in enumerate(soup):
        for key, tensor in adapter.tensors.items():
            expected = sum(w * s[index].tensors[key] for w, s in zip(numbers, stored, strict=True))
            torch.testing.assert_close(tensor, expected)
    model = tiny()
    assert [a.method.name for a in veneer.load_all(model, out)] == ["houlsby", "linear_probe"]


def test_the_mean_of_compositions(tmp_path: Path) -> None:
    """Files with equal trees over other names keep the tree; other trees have no mean."""
    paths = [saved(tmp_path, name, seed=i) for i, name in enumerate("wxyz")]
    halves = [
        compose_files(pair, tmp_path / f"pair-{i}", "average", (0.2, 0.5))[0] for i, pair in enumerate((paths[:2], paths[2:]))
    ]
    found = composition_of(veneer.load_all(tiny(), average_files(halves, tmp_path / "soup")))
    assert found is not None
    assert found.node == Average("w", "x", weights=(0.2, 0.5))
    stack, _ = compose_files(paths[2:], tmp_path / "stack", "stack")
    with raises(CombineError, file=str(stack), where="composition"):
        average_files([halves[0], stack], tmp_path / "out")


def test_nodes_that_cannot_be_loaded_are_not_written(tmp_path: Path) -> None:
    """A Parallel below an Average, and trained base parameters, which have no copy for each child."""
    paths = [saved(tmp_path, name, seed=i) for i, name in enumerate("xy")]
    pair, _ = compose_files(paths, tmp_path / "pair", "parallel")
    with raises(OptionError, option="node", method="compose", expected="one Parallel"):
        compose_files([pair, paths[0]], tmp_path / "out", "average")
    trained = saved(tmp_path, "trained", train=["norm"])
    for node in ("average", "parallel"):
        with raises(CombineError, file=str(trained), expected=()):
            compose_files([paths[0], trained], tmp_path / "out", node)
    assert not (tmp_path / "out.safetensors").exists()
    veneer.load_all(tiny(), compose_files([paths[0], trained], tmp_path / "out", "stack")[0])


@pytest.mark.parametrize("count", [1, 100, 150, 199, 1000])
def test_images_of_a_domain_are_spread_over_the_folder(count: int) -> None:
    chosen = [int(path.name) for path in select_evenly([Path(str(i)) for i in range(count)], 100)]
    assert len(set(chosen)) == min(count, 100)
    assert max(b - a for a, b in zip([*chosen, count], [*chosen[1:], count], strict=False)) <= -(-count // 100)


def permuted(tensors: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    return {
        "down": tensors["down"][order],
        "down_bias": tensors["down_bias"][order],
        "up": tensors["up"][:, order],
        "up_bias": tensors["up_bias"],
    }


def test_the_transport_plan_is_the_best_of_all_permutations() -> None:
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    best = min(itertools.permutations(range(5)), key=lambda p: sum(float(cost[i, j]) for i, j in enumerate(p)))
    assert transport_plan(cost).tolist() == list(best)
    a, b = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(squared_distances(a, b), ((a[:, None] - b[None]) ** 2).sum(-1))


def test_aligned_neurons(tmp_path: Path) -> None:
    """A permuted copy is restored exactly, and its mean with the original is the original; the plain mean is not."""
    first = saved(tmp_path, "first", seed=1, bottleneck=5)
    model = tiny()
    copy = veneer.load(model, first)
    order = torch.tensor([3, 1, 4, 0, 2])
    for _, adapter in copy.parts.values():
        for key, tensor in permuted(dict(adapter.named_parameters()), order).items():
            adapter.get_parameter(key).data.copy_(tensor.clone())
    second = copy.save(tmp_path / "second")
    with torch.no_grad():
        expected = model(picture())
    for aligned in (True, False):
        twin = tiny()
        veneer.load(twin, average_files([first, second], tmp_path / f"mean{aligned}", aligned=aligned))
        with torch.no_grad():
            difference = (twin(picture()) - expected).abs().max()
        assert (difference < 1e-12) == aligned
    stored = read_stored(first)[0].tensors
    site = "blocks.0.mlp.branch"
    tensors = {key.rpartition(":")[2]: t for key, t in stored.items() if key.startswith(f"{site}:")}
    restored = align(tensors, permuted(tensors, order))
    assert all(torch.equal(restored[key], tensor) for key, tensor in tensors.items())


def test_alignment_by_activations(tmp_path: Path) -> None:
    """The order of the neurons whose activations on the same images are nearest, over all permutations.

    The activations of the first block are those of the bare model's MLP output, GELU(Down(y)).
    """
    bare: Any = tiny()
    b, x = bare.blocks[0], bare.norm_pre(bare._pos_embed(bare.patch_embed(picture())))
    x = x + b.ls1(b.attn(b.norm1(x)))
    y = b.ls2(b.mlp(b.norm2(x)))
    paths = [saved(tmp_path, name, seed=i, bottleneck=4) for i, name in enumerate("xy")]
    recorded: list[Any] = []
    for path in paths:
        model = tiny()
        tuned: Attachment = veneer.load(model, path)
        with torch.no_grad(), record_activations(tuned) as activations:
            model(picture())
        recorded.append(activations)
        adapter: Any = tuned.parts["blocks.0.mlp.branch"][1]
        by_hand = torch.nn.functional.gelu(y @ adapter.down.T + adapter.down_bias).movedim(-1, 0).flatten(1)
        torch.testing.assert_close(activations["blocks.0.mlp.branch"], by_hand)
        with torch.no_grad():
            model(picture())
    site = "blocks.1.mlp.branch"
    a, b = (each[site] for each in recorded)
    assert a.shape == (4, 2 * 17)
    best = min(itertools.permutations(range(4)), key=lambda p: sum(float(((a[i] - b[j]) ** 2).sum()) for i, j in enumerate(p)))
    first, second = (
        {k.rpartition(":")[2]: t for k, t in read_stored(p)[0].tensors.items() if k.startswith(f"{site}:")} for p in paths
    )
    expected = permuted(second, torch.tensor(best))
    merged = read_stored(average_files(paths, tmp_path / "m", aligned=True, activations=recorded))[0].tensors
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[f"{site}:{key}"], (first[key] + tensor) / 2)


def test_selection_of_domains() -> None:
    """Three separate clouds; the new images lie in the first and, 4 of 20, in the third."""
    generator = torch.Generator().manual_seed(0)
    centers = 6 * torch.eye(3, 8)
    domains = [center + torch.randn(30, 8, generator=generator) for center in centers]
    images = torch.cat(
        [centers[0] + torch.randn(16, 8, generator=generator), centers[2] + torch.randn(4, 8, generator=generator)]
    )
    assert select_adapters(domains, images) == (0.5, 0.0, 0.5)
    assert select_adapters(domains, images, share=0.3) == (1.0, 0.0, 0.0)
    assert select_adapters(domains, images, share=1.0) == (1.0, 0.0, 0.0)
    assert select_adapters(domains, images, most=1) == (1.0, 0.0, 0.0)
    means = [torch.nn.functional.normalize(d, dim=1).mean(0) for d in (*domains, images)]
    cosines = [float(m @ means[-1] / m.norm() / means[-1].norm()) for m in means[:-1]]
    order = sorted(range(3), key=lambda i: -cosines[i])
    got = select_adapters(domains, images, "similarity", most=2)
    assert got == tuple(0.5 if i in order[:2] else 0.0 for i in range(3))
    for option, given in (("by", "mean"), ("most", 0), ("share", 1.5)):
        with raises(OptionError, method="select_adapters", option=option, given=given):
            select_adapters(domains, images, **{option: given})
    with raises(OptionError, option="domains", given=[8, 8, 8, 7]):
        select_adapters(domains, images[:, :7])


def test_files_that_differ(tmp_path: Path) -> None:
    first = saved(tmp_path, "first")
    for name, options, where in (
        ("method", {"method": "pfeiffer"}, "method"),
        ("options", {"bottleneck": 4}, "options"),
        ("sites", {"where": "attn"}, "sites"),
    ):
        with raises(CombineError, file=str(saved(tmp_path, name, **options)), where=where):
            average_files([first, tmp_path / name], tmp_path / "out")
    with raises(CombineError, where="method", given="lora", expected="svd"):
        average_files([saved(tmp_path, n, method="lora", rank=1) for n in ("l1", "l2")], tmp_path / "out")
    with raises(CombineError, where="adapters.0.down"):
        fused = {"method": "houlsby", "options": {"bottleneck": 2}}
        paths = [saved(tmp_path, n, method="adapter_fusion", adapters=("a", "b"), fused=fused) for n in ("f1", "f2")]
        average_files(paths, tmp_path / "out", aligned=True)
    model = tiny()
    model.blocks[0].attn.qkv.weight.data.neg_()  # type: ignore[union-attr, index]
    other = attach(model, "houlsby", where="mlp", bottleneck=3)
    stirred(other)
    with raises(CombineError, where="fingerprint"):
        compose_files([first, other.save(tmp_path / "base")], tmp_path / "out", "average")
    with raises(CombineError, where="class"):
        swin = attach(tiny_swin(), "houlsby", where="mlp", bottleneck=3)
        compose_files([first, swin.save(tmp_path / "swin")], tmp_path / "out", "average")
    with raises(OptionError, option="files"):
        compose_files([first], tmp_path / "out", "average")
    for weights in ((1.0,), (1.0, -1.0), (float("nan"), 1.0)):
        with raises(OptionError, option="weights"):
            average_files([first, first], tmp_path / "out", weights)
    with raises(OptionError, option="weights"):
        compose_files([first, first], tmp_path / "out", "stack", (1.0, 1.0))
    with raises(OptionError, option="node", given="mean"):
        compose_files([first, first], tmp_path / "out", "mean")
    with raises(LoadError, file=str(tmp_path / "missing")):
        compose_files([first, tmp_path / "missing"], tmp_path / "out", "stack")
    assert not (tmp_path / "out.safetensors").exists()


def tiny_swin() -> Any:
    torch.manual_seed(0)
    return next(iter(veneer.hosts.get("timm_swin")().tiny().values()))()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of three domains of images: the red ones are averaged for new red images."""
    paths = [saved(tmp_path, name, seed=i) for i, name in enumerate("xyz")]
    folders = []
    for number, (name, channel) in enumerate((("a", 0), ("b", 2), ("c", 1), ("new", 0))):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        for i in range(4):
            pixels = torch.randint(0, 60, (64, 64, 3), generator=torch.Generator().manual_seed(10 * number + i))
            pixels[..., channel] += 180
            Image.fromarray(pixels.byte().numpy()).save(folders[-1] / f"{i}.png")
    words = ["merge", *map(str, paths), "--out", str(tmp_path / "soup"), "--method", "aligned", "--most", "1"]
    assert main([*words, "--images", str(folders[3]), "--select", "similarity", "--domains", *map(str, folders[:3])]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'soup'}.safetensors",
        "x.safetensors: 1",
        "y.safetensors: 0",
        "z.safetensors: 0",
    ]
    soup, first = (read_stored(path)[0].tensors for path in (tmp_path / "soup", paths[0]))
    assert all(torch.equal(soup[key], tensor) for key, tensor in first.items())
    words = ["merge", *map(str, paths), "--out", str(tmp_path / "tree"), "--method", "average", "--weights", "1", "-1", "2"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[1] == "Average('x', 'y', 'z', weights=[1.0, -1.0, 2.0])"
    files = tuple(paths)
    for option, options in {
        "rank": {"method": "average", "rank": 2},
        "images": {"method": "stack", "images": tmp_path},
        "most": {"method": "svd", "most": 2},
        "select": {"method": "parameters", "select": "similarity"},
        "clip": {"method": "aligned", "clip": str(tmp_path)},
        "weights": {"method": "parameters", "weights": ("1", "attn=1", "1")},
        "domains": {"method": "parameters", "images": tmp_path, "domains": (tmp_path,)},
    }.items():
        with raises(OptionError, option=option, method="merge"):
            merge(MergeConfig(files, out=tmp_path / "out", **options))  # type: ignore[arg-type]
