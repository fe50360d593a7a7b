"""The merging benchmark merges and unmerges, and does not change the shared base."""

from __future__ import annotations

import pytest
import torch

from veneer.benchmarks import merging
from veneer.benchmarks.interleaved_timing import interleave
from veneer.benchmarks.shapes import SHAPES, unet


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contests_restore_the_weights(dtype: torch.dtype) -> None:
    shape = SHAPES["tiny"]
    base = unet(shape.unet, shape.latent, dtype, seed=0)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    merge, unmerge = merging.of(base, rank=2, seed=0)
    for contest in (merge, unmerge):
        outcome = interleave(contest, rounds=2)
        assert {(r.of, r.to) for r in outcome.ratios()} == set(contest.pairs)
        assert all(seconds > 0 for seconds in outcome.values().values())
    assert [c.name for c in merge.contenders] == ["veneer", "copy", "diffusers"]
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


@pytest.mark.parametrize("which", ["veneer", "diffusers"])
def test_contenders_merge_and_unmerge_every_projection(which: str) -> None:
    shape = SHAPES["tiny"]
    base = unet(shape.unet, shape.latent, torch.float32, seed=0)
    model = merging._own_attention(base)
    way = merging._veneer(merging.peers.with_veneer(model, 2), 0) if which == "veneer" else merging._diffusers(model, 2, 0)
    places = [n for n, m in model.named_modules() if n.endswith(merging.peers.TARGETS)]
    after = [weight(model, n).clone() for n in places]
    way.merge(None)
    merged = [weight(model, n).clone() for n in places]
    way.merge(None)  # a second time does nothing
    assert all(torch.equal(weight(model, n), w) for n, w in zip(places, merged, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(after, merged, strict=True))
    way.unmerge(None)
    for n, w in zip(places, after, strict=True):
        torch.testing.assert_close(weight(model, n), w)


def weight(model: torch.nn.Module, path: str) -> torch.Tensor:
    module = model.get_submodule(path)
    return getattr(module, "base_layer", module).weight.detach()  # type: ignore[union-attr, return-value]
