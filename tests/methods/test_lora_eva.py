"""LoRA initialized from principal components of layer inputs (EVA): components, ranks by explained variance, training, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.methods.layers import conv_site, site_of
from tests.methods.selections import losses, tiny
from tests.raising import raises
from veneer.functional.principal_components import PrincipalComponents
from veneer.injection import attach
from veneer.injection.errors import EmptySelection, NotSelected, OptionError
from veneer.methods.reparameterized.low_rank._explained_variance import allocate_ranks
from veneer.methods.reparameterized.low_rank.lora import LoRA
from veneer.testing.case import loss

WHERE = "attn.{q,v,out} mlp.{in,out}"


def batches() -> list[Tensor]:
    torch.manual_seed(0)
    mix = torch.randn(6, 9, dtype=torch.float64) * torch.logspace(1, -1, 6, dtype=torch.float64)[:, None]
    return [torch.randn(n, 6, dtype=torch.float64) @ mix + 3 for n in (7, 30, 4)]


def test_components_of_batches_are_those_of_all_rows() -> None:
    """Against the decomposition of all centered rows, with all components kept; and against peft with few of them."""
    rows = torch.cat(batches())
    all_of_them = PrincipalComponents(9)
    for batch in batches():
        all_of_them.update(batch)
    centered = rows - rows.mean(0)
    _, values, vectors = torch.linalg.svd(centered, full_matrices=False)
    torch.testing.assert_close(all_of_them.ratios, values**2 / centered.square().sum())
    torch.testing.assert_close((all_of_them.vectors[:6] @ vectors[:6].T).abs(), torch.eye(6, dtype=torch.float64))
    pca = pytest.importorskip("peft.utils.incremental_pca")
    few, theirs = PrincipalComponents(3), pca.IncrementalPCA(n_components=3)
    for batch in batches():
        few.update(batch)
        theirs.partial_fit(batch)
    torch.testing.assert_close(few.ratios, theirs.explained_variance_ratio_)
    torch.testing.assert_close((few.vectors * theirs.components_).sum(1).abs(), torch.ones(3, dtype=torch.float64))


def inputs_of(model: nn.Module, tuned: Any, samples: list[Any]) -> dict[str, Tensor]:
    """Inputs of the adapted layers of a bare model in all samples, (rows, width)."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _, args, __, p=path: seen.setdefault(p, []).append(args[0]))
        for path in {site.path for site, _ in tuned.parts.values()}
    ]
    for sample in samples:
        model(**sample)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat([t.detach().flatten(0, -2) for t in several]) for path, several in seen.items()}


def test_ranks_follow_the_explained_variance_of_a_vit(tmp_path: Path) -> None:
    """A has the components of each layer's inputs, the total rank is kept, and the file is a plain LoRA with a rank per site."""
    model, samples = tiny("timm_vit", "vit")
    bare = copy.deepcopy(model)
    tuned = attach(model, "lora", rank=3, alpha=6.0, init="eva", eva_rho=2.0, eva_samples=1, where=WHERE)
    with raises(NotSelected, given="lora"):
        loss(model, samples[0])
    tuned.select(losses(model, samples))
    assert torch.equal(loss(model, samples[0]), loss(bare, samples[0]))
    ratios, expected = [], inputs_of(bare, tuned, samples[:1])
    for site, adapter in tuned.parts.values():
        rows = expected[site.path] - expected[site.path].mean(0)
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        rank = int(adapter.down.any(1).sum())
        assert 1 <= rank <= len(adapter.down) == 6
        alike = (adapter.down[:rank].detach() @ vectors[:rank].T).abs()
        torch.testing.assert_close(alike, torch.eye(rank, dtype=alike.dtype), rtol=0, atol=1e-3)
        ratios.append((values**2 / values.square().sum(), rank))
    assert sum(rank for _, rank in ratios) == 3 * len(ratios)
    least = min(r[rank - 1] for r, rank in ratios if rank > 1)
    assert all(r[rank] <= least + 1e-6 for r, rank in ratios if rank < 6)
    assert len({rank for _, rank in ratios}) > 1
    optimizer = torch.optim.Adam(tuned.parameters(), 1e-2)
    for _ in range(2):
        loss(model, samples[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    before, scales = loss(model, samples[1]), {adapter.scaling for _, adapter in tuned.parts.values()}
    tuned.finalize()
    assert [len(adapter.down) for _, adapter in tuned.parts.values()] == [rank for _, rank in ratios]
    torch.testing.assert_close(loss(model, samples[1]), before)
    loaded = veneer.load(bare, tuned.save(tmp_path / "x"))
    torch.testing.assert_close(loss(bare, samples[1]), before)
    assert loaded.method.init == "kaiming"
    assert {adapter.scaling for _, adapter in loaded.parts.values()} == scales == {2.0}


def test_equal_ranks_at_some_sites_and_an_unfinished_file(tmp_path: Path) -> None:
    """Without redistribution, beside sites with another initialization; `finalize` leaves those as they are."""
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "lora", rank=3, eva_rho=1.0, by_site={"attn.{q,v}": {"init": "eva"}}, where=WHERE)
    tuned.select(losses(model, samples))
    assert all(adapter.down.any(1).all() and len(adapter.down) == 3 for _, adapter in tuned.parts.values())
    other, _ = tiny("timm_vit", "vit")
    loaded = veneer.load(other, tuned.save(tmp_path / "x"))
    assert loaded.is_selected
    assert torch.equal(loss(other, samples[0]), loss(model, samples[0]))
    tuned.finalize()
    names = {f"name:{site.name}" for site, _ in tuned.parts.values() if site.role in ("attn.q", "attn.v")}
    assert names == {key for key in tuned.method.by_site if key.startswith("name:")}
    assert torch.equal(loss(other, samples[0]), loss(model, samples[0]))


def test_rejections() -> None:
    model, _ = tiny("timm_vit", "vit")
    tuned = attach(model, "lora", init="eva", where="attn.q")
    with raises(EmptySelection, where=next(iter(tuned.parts)), given=0, expected="inputs"):
        tuned.select(iter(()))
    with raises(OptionError, method="lora", option="init", given="conv", expected="linear"):
        LoRA(init="eva").build(conv_site(nn.Conv2d(4, 4, 1)))
    for option, given in (("eva_rho", 0.5), ("eva_samples", 0)):
        with raises(OptionError, method="lora", option=option, given=given):
            LoRA(**{option: given})
    with raises(OptionError, method="lora", option="tucker", given="eva"):
        LoRA(init="eva", tucker=True)
    assert not LoRA().selects
    assert LoRA(by_site={"attn.q": {"init": "eva"}}).selects
    assert LoRA(init="eva").build(site_of(nn.Linear(5, 4))).down.shape == (5, 5)


@pytest.mark.parametrize(("budget", "ranks"), [(3, [1, 1, 1]), (5, [1, 1, 3]), (6, [2, 1, 3])])
def test_every_site_keeps_its_first_component(budget: int, ranks: list[int]) -> None:
    ratios = [torch.tensor(values) for values in ([0.6, 0.3], [0.1, 0.05], [0.4, 0.35, 0.32])]
    assert allocate_ranks(ratios, budget) == ranks
