"""AdapterFusion: y + V Σ_n w_n a_n with attention over the changes of frozen adapters, written out, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import veneer
from tests.methods.bottlenecks import blocks_written_out, branch, change, check_layouts, picture, stirred, tiny
from tests.methods.runs import DEPTH, check_resume
from tests.raising import raises
from veneer.injection import LoadError, StateError, UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.experts.adapter_fusion import AdapterFusion

INNER = {
    "houlsby": {"bottleneck": 3},
    "adaptformer": {"bottleneck": 3, "scale": 0.7},
    "pfeiffer": {"reduction": 2, "input": "sum"},
}


def fused_change(fusion: Any, x: Tensor, changes: list[Tensor]) -> Tensor:
    """V Σ w a at one position."""
    scores = torch.stack([(fusion.query @ x + fusion.query_bias) @ (fusion.key @ a) for a in changes])
    weights = scores.exp() / scores.exp().sum()
    return fusion.value @ sum(w * a for w, a in zip(weights, changes, strict=True))


@pytest.mark.parametrize("name", INNER)
def test_the_equation_in_every_layout(name: str) -> None:
    act = torch.nn.functional.gelu if name == "houlsby" else torch.relu

    def slow(fusion: Any, x: Tensor, y: Tensor) -> Tensor:
        rows = []
        for u, v in zip(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), strict=True):
            inner = u + v if name == "pfeiffer" else u
            changes = [adapter.scale * change(adapter, act, inner) for adapter in fusion.adapters]
            rows.append(v + fused_change(fusion, u, changes))
        return torch.stack(rows).view(y.shape)

    class Stirred(AdapterFusion):
        """With buffers far from their initial values, on the scale of features."""

        def build(self, site: Any) -> Any:
            adapter = super().build(site)
            for number, buffer in enumerate(adapter.adapters.buffers()):
                if buffer.ndim:
                    buffer.normal_(generator=torch.Generator().manual_seed(number))
            return adapter

    check_layouts(Stirred(("a", "b", "c"), fused={"method": name, "options": INNER[name]}), branch, slow)


def files(folder: Path, count: int = 2, method: str = "houlsby", **options: Any) -> tuple[str, ...]:
    """Files of adapters of a tiny ViT."""
    paths = []
    for number in range(count):
        model = tiny()
        tuned = attach(model, method, **{"bottleneck": 3, "where": "mlp", **options})
        stirred(tuned)
        with torch.no_grad():
            for p in tuned.parameters():
                p.add_(torch.randn_like(p), alpha=0.1 * number)
        paths.append(str(tuned.save(folder / f"task{number}")))
    return tuple(paths)


def test_a_vit_with_adapters_of_files_in_values_and_gradients(tmp_path: Path) -> None:
    paths, bare, model = files(tmp_path), tiny(), tiny()
    sources = [veneer.load(tiny(), path) for path in paths]
    tuned = attach(model, "adapter_fusion", adapters=paths)
    adapters: dict[str, Any] = stirred(tuned)
    assert list(adapters) == ["blocks.0.mlp.branch", "blocks.1.mlp.branch"]

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        x = x + b.ls1(b.attn(b.norm1(x)))
        y = b.ls2(b.mlp(b.norm2(x)))
        name = f"blocks.{depth}.mlp.branch"
        own: list[Any] = [source.parts[name][1] for source in sources]
        a = torch.stack([nn.functional.gelu(y @ s.down.T + s.down_bias) @ s.up.T + s.up_bias for s in own], 2)
        fusion = adapters[name]
        scores = torch.einsum("bld,blnd->bln", y @ fusion.query.T + fusion.query_bias, a @ fusion.key.T)
        return x + y + torch.einsum("bln,blnd->bld", scores.softmax(-1), a @ fusion.value.T)

    expected, got = blocks_written_out(bare, block, picture()), model(picture())
    torch.testing.assert_close(got, expected)
    assert (expected - bare(picture())).abs().max() > 1e-3
    parameters = list(tuned.parameters())
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)
        assert other.abs().max() > 1e-9
    assert not any(b.requires_grad for _, adapter in tuned.parts.values() for b in adapter.buffers())


@pytest.mark.parametrize("method", ["adapter_plus", "adaptformer", "ciat", "convpass", "houlsby", "mona", "pfeiffer"])
def test_equal_adapters_have_the_effect_of_one(method: str, tmp_path: Path) -> None:
    """Without V, with weights that sum to 1: each method reads its own port, such as the norm of the branch."""
    options = {"where": "mlp"} if method == "ciat" else {}
    source = attach(alone := tiny(), method, **options)
    stirred(source)
    path, model = str(source.save(tmp_path / "task")), tiny()
    tuned = attach(model, "adapter_fusion", adapters=(path, path), value=False)
    with torch.no_grad():
        expected = alone(picture())
        torch.testing.assert_close(model(picture()), expected)
        assert (expected - tiny()(picture())).abs().max() > 1e-3
    assert {key.rpartition(":")[2] for key, _ in tuned.named_parameters()} == {"query", "key", "query_bias"}


@pytest.mark.parametrize(
    ("method", "site"), [("adapter_drop", "blocks.0.mlp.branch"), ("ciat", "blocks.0.stream"), ("lorand", "blocks.0.attn.branch")]
)
def test_adapters_that_cannot_be_fused(method: str, site: str, tmp_path: Path) -> None:
    """One that knows the order of the layers, one at the input of a block, one that is no bottleneck."""
    path, model = str(attach(tiny(), method).save(tmp_path / "task")), tiny()
    with raises(UnsupportedSite, site=site, option="fused", given=method):
        attach(model, "adapter_fusion", adapters=(path, path))


def test_the_saved_file_needs_no_other(tmp_path: Path) -> None:
    paths, model, twin = files(tmp_path), tiny(), tiny()
    tuned = attach(model, "adapter_fusion", adapters=paths)
    stirred(tuned)
    saved = tuned.save(tmp_path / "fusion")
    for path in paths:
        Path(path).unlink()
    again = veneer.load(twin, saved)
    assert torch.equal(twin(picture()), model(picture()))
    assert again.method.config()["adapters"] == ("task0", "task1")
    assert str(tmp_path) not in saved.read_bytes()[:20_000].decode(errors="replace")
    second = veneer.load(tiny(), again.save(tmp_path / "copy"))
    assert all(torch.equal(second.state_dict()[key], value) for key, value in tuned.state_dict().items())


def test_options_by_site_keep_the_files(tmp_path: Path) -> None:
    paths = files(tmp_path)
    tuned = attach(tiny(), "adapter_fusion", adapters=paths, by_site={"name:blocks.0.mlp.branch": {"value": False}})
    first, second = [adapter for _, adapter in tuned.parts.values()]
    assert (first.value, second.value is None) == (None, False)
    source = veneer.load(tiny(), paths[1])
    for name, (_, fusion) in tuned.parts.items():
        assert torch.equal(fusion.adapters[1].down, source.parts[name][1].down)


def test_the_frozen_adapters_have_no_dropout(tmp_path: Path) -> None:
    paths, model = files(tmp_path, method="adaptformer", dropout=0.5, scale=1.0), tiny()
    attach(model, "adapter_fusion", adapters=paths)
    expected = model(picture())
    torch.testing.assert_close(model.train()(picture()), expected)


def test_adapters_with_little_attention_are_removed(tmp_path: Path) -> None:
    """Each site keeps the two with the highest mean attention in training passes, moving average 0.99; files have no others."""
    paths, model = files(tmp_path, 4), tiny()
    tuned = attach(model, "adapter_fusion", adapters=paths, keep=2)
    adapters: dict[str, Any] = stirred(tuned)
    with raises(StateError, where="blocks.0.mlp.branch", given="untrained"):
        tuned.finalize()
    seen: dict[str, list[Tensor]] = {name: [] for name in adapters}

    def recorded(name: str, fusion: Any, output: Any) -> Any:
        def run(x: Tensor, y: Tensor) -> Tensor:
            a = torch.stack([each.output(x, y) - y for each in fusion.adapters], 2)
            scores = torch.einsum("bld,blnd->bln", x @ fusion.query.T + fusion.query_bias, a @ fusion.key.T)
            seen[name].append(scores.softmax(-1).mean((0, 1)).detach())
            return output(x, y)

        return run

    for name, fusion in adapters.items():
        fusion.output = recorded(name, fusion, fusion.output)
    for seed in (1, 2):
        model.train()(picture() * seed)
    model.eval()(picture())
    for fusion in adapters.values():
        del fusion.output
    before = {name: [id(a) for a in fusion.adapters] for name, fusion in adapters.items()}
    means = {name: 0.99 * 0.01 * first + 0.01 * second for name, (first, second, _) in seen.items()}
    for name, fusion in adapters.items():
        torch.testing.assert_close(fusion.attention, means[name], rtol=1e-5, atol=0, check_dtype=False)
    tuned.finalize()
    names = {}
    for name, fusion in adapters.items():
        mean = means[name]
        best = sorted(sorted(range(4), key=lambda i: -float(mean[i]))[:2])
        assert [id(a) for a in fusion.adapters] == [before[name][i] for i in best]
        names[name] = [f"task{i}" for i in best]
    assert tuned.method.config()["kept"] == names
    twin, method = tiny(), tuned.method
    tuned.finalize()
    assert tuned.method is method
    again = veneer.load(twin, tuned.save(tmp_path / "pruned"))
    assert torch.equal(twin(picture()), model(picture()))
    assert again.method.config()["kept"] == names
    assert sum("adapters.2" in key for key in again.state_dict()) == 0


def test_checkpoints_have_the_recorded_attention(tmp_path: Path) -> None:
    """The tensors of a checkpoint are those that training passes update, so a resumed run keeps the same adapters."""
    method = AdapterFusion(("a", "b", "c"), fused={"method": "houlsby", "options": {"bottleneck": 3}}, keep=2)
    stopped = check_resume(method, tmp_path, 7)
    recorded = [tensor for name, tensor in stopped.named.items() if name.endswith(":attention")]
    assert len(recorded) == DEPTH
    for attention in recorded:
        expected = torch.tensor(1 - 0.99**14)  # two micro-batches in each of seven steps
        torch.testing.assert_close(attention.sum(), expected, rtol=1e-5, atol=0)


def test_the_penalty() -> None:
    fused = {"method": "houlsby", "options": {"bottleneck": 3}}
    tuned = attach(tiny(), "adapter_fusion", adapters=("a", "b"), fused=fused, regularization=0.3)
    adapters: dict[str, Any] = stirred(tuned)
    expected = 0.3 * sum(((torch.eye(len(a.value)) - a.value) ** 2).sum() for a in adapters.values())
    torch.testing.assert_close(tuned.penalty(), expected)
    for options in ({"value": False}, {"regularization": 0.0}):
        assert attach(tiny(), "adapter_fusion", adapters=("a", "b"), fused=fused, **options).penalty() is None


def test_counts() -> None:
    """AdapterHub has 21,252,096 with a bias of K for each of 12 blocks, which the softmax cancels."""
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        fused = {"method": "pfeiffer", "options": {}}
        count = attach(vit, "adapter_fusion", adapters=("a", "b"), fused=fused).report().trainable
        assert count == 21_252_096 - 12 * 768 == 21_242_880


def test_start() -> None:
    torch.manual_seed(0)
    adapter = AdapterFusion(("a", "b"), fused={"method": "houlsby", "options": {}}).build(branch(width=150))
    for matrix in (adapter.query, adapter.key):
        assert matrix.std().item() == pytest.approx(0.02, rel=0.03)
    assert not adapter.query_bias.any()
    off = adapter.value[~torch.eye(150, dtype=torch.bool)]
    assert adapter.value.diagonal().eq(1).all()
    assert off.eq(off[0]).all()
    assert off[0].item() == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("other", "where"),
    [
        ({"method": "adaptformer"}, "method"),
        ({"bottleneck": 4}, "options"),
        ({"where": "attn"}, "sites"),
    ],
)
def test_adapters_that_differ(other: dict[str, Any], where: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = *files(tmp_path, 1), *files(tmp_path / "other", 1, **other)
    with raises(OptionError, method="adapter_fusion", option="adapters", where=where):
        AdapterFusion((first, second))


def test_adapters_of_other_models(tmp_path: Path) -> None:
    paths = files(tmp_path)
    model = tiny()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.neg_()
    with raises(OptionError, method="adapter_fusion", option="adapters", where="fingerprint"):
        attach(model, "adapter_fusion", adapters=paths)
    assert veneer.attachments(model) == []
    wide: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2)
    with raises(UnsupportedSite, site="blocks.0.mlp.branch", given=(3, 24), expected=(3, 48)):
        attach(wide, "adapter_fusion", adapters=paths)
    shallow: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=2)
    with raises(UnsupportedSite, site="blocks.2.mlp.branch", given=None):
        attach(shallow, "adapter_fusion", adapters=paths, where="name:blocks.2.mlp.branch")


def test_bad_input(tmp_path: Path) -> None:
    with raises(OptionError, option="adapters", given=("a",)):
        AdapterFusion(("a",))
    with raises(OptionError, option="regularization", given=-1.0):
        AdapterFusion(regularization=-1.0)
    for keep in (-1, 3):
        with raises(OptionError, option="keep", given=keep):
            AdapterFusion(("a", "b"), keep=keep, fused={"method": "houlsby"})
    with raises(UnsupportedSite, option="adapters", given=()):
        attach(tiny(), "adapter_fusion")
    with raises(UnsupportedSite, option="fused", given="lst"):
        attach(tiny(), "adapter_fusion", adapters=("a", "b"), fused={"method": "lst"}, where="block")
    with raises(UnsupportedSite, option="fused"):
        attach(tiny(), "adapter_fusion", adapters=("a", "b"), fused={"method": "none"})
    lora = attach(tiny(), "lora").save(tmp_path / "lora")
    with raises(OptionError, option="adapters", given=("lora",)):
        AdapterFusion((str(lora), str(lora)))
    missing = str(tmp_path / "missing")
    with raises(LoadError, file=missing):
        AdapterFusion((missing, str(lora)))
