"""Keys and values added to attention: the softmax written out, for every form of mask, and the modules that are changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode

from tests.raising import raises
from veneer.hosts._describe import calls_sdpa
from veneer.injection import HostChanged, hosts
from veneer.injection.method import Adapter
from veneer.injection.seams.attention_call import AttentionCall
from veneer.injection.seams.key_value_seam import AddedKeys, KeyValueSeam
from veneer.injection.sites import WeightSite

HEADS, TOKENS, CHANNELS, LENGTH, OTHER = 2, 3, 4, 5, 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KEYS, VALUES = random(HEADS, TOKENS, CHANNELS, seed=1), random(HEADS, TOKENS, CHANNELS, seed=2)


class Added(Adapter):
    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(KEYS + shift), nn.Parameter(VALUES - shift)
        self.strength = self.strength.double()

    def keys_values(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


def joined(module: nn.Module, shift: float = 0.0, strength: float = 1.0, adapter: Adapter | None = None) -> KeyValueSeam:
    """A seam on the attention at `attn` of a module."""
    site = WeightSite(
        name="attn.out", role="attn.out", path="attn.out", d_out=8, d_in=8, heads=HEADS, attention="attn", sdpa=True
    )
    seam = KeyValueSeam(module, [(site, adapter or Added(shift))])
    seam.join("x")
    seam.write_strength(strength)
    return seam


def written_out(q: Tensor, k: Tensor, v: Tensor, scores: Tensor, strength: float, pairs: Any = ((KEYS, VALUES),)) -> Tensor:
    """The weights exp(q·k / √d + scores), those of the added keys times the strength, over their sum. One query at a time."""
    out = torch.empty_like(q)
    for b in range(len(q)):
        for h in range(HEADS):
            keys = torch.cat([*(p[h] for p, _ in pairs), k[b, h]])
            values = torch.cat([*(p[h] for _, p in pairs), v[b, h]])
            for i, query in enumerate(q[b, h]):
                weights = torch.stack([(query @ key / math.sqrt(q.shape[-1])).exp() for key in keys])
                added = TOKENS * len(pairs)
                weights = torch.cat([strength * weights[:added], weights[added:] * scores[i].exp()])
                out[b, h, i] = weights @ values / weights.sum()
    return out


MASKS: dict[str, Any] = {
    "none": {},
    "float": {"attn_mask": random(LENGTH, OTHER, seed=5)},
    "bool": {"attn_mask": random(LENGTH, OTHER, seed=5) > -0.5},
    "row": {"attn_mask": random(1, 1, 1, OTHER, seed=5)},
    "causal": {"is_causal": True},
}


def scores_of(options: dict[str, Any]) -> Tensor:
    mask = options.get("attn_mask", torch.ones(LENGTH, OTHER, dtype=torch.bool).tril() if options else torch.zeros(LENGTH, OTHER))
    mask = torch.zeros(LENGTH, OTHER).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
    return mask.reshape(-1, OTHER).expand(LENGTH, -1)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("strength", [None, 0.5])
def test_attention_is_the_softmax_over_all_keys(mask: str, strength: float | None) -> None:
    q, k, v = (random(2, HEADS, n, CHANNELS, seed=s).requires_grad_() for n, s in ((LENGTH, 6), (OTHER, 7), (OTHER, 8)))
    buffer = None if strength is None else torch.tensor(strength, dtype=torch.float64)
    with AddedKeys(KEYS, VALUES, buffer):
        got = F.scaled_dot_product_attention(query=q, key=k, value=v, **MASKS[mask])
        second = F.scaled_dot_product_attention(q, k, v)
    expected = written_out(q, k, v, scores_of(MASKS[mask]), 1 if strength is None else strength)
    torch.testing.assert_close(got, expected)
    assert torch.equal(second, F.scaled_dot_product_attention(q, k, v))
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_of_attention_is_kept() -> None:
    q, k, v = (random(2, HEADS, n, CHANNELS, seed=s) for n, s in ((LENGTH, 6), (OTHER, 7), (OTHER, 8)))
    outputs = []
    for call in (F.scaled_dot_product_attention, lambda *given, **named: AttentionCall.of(*given, **named).output()):
        torch.manual_seed(0)
        outputs.append(call(q, k, v, dropout_p=0.5))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    assert (outputs[0] - F.scaled_dot_product_attention(q, k, v)).abs().max() > 1e-3


class Block(nn.Module):
    """Calls `MultiheadAttention` as open_clip does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn: Any = nn.MultiheadAttention(HEADS * CHANNELS, HEADS, batch_first=True).double()
        self.options: dict[str, Any] = {}

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        out: Tensor = self.attn(x, y, y, need_weights=False, **self.options)[0]
        return out


def by_hand(attn: Any, x: Tensor, y: Tensor, scores: Tensor, **options: Any) -> Tensor:
    parts = zip((x, y, y), attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True)
    q, k, v = (F.linear(z, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2) for z, w, b in parts)
    return attn.out_proj(written_out(q, k, v, scores, **options).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_multihead_attention(strength: float) -> None:
    block, x, y = Block().eval(), random(2, LENGTH, 8, seed=3), random(2, OTHER, 8, seed=4)
    before = block(x)
    seam = joined(block, strength=strength)
    torch.testing.assert_close(block(x), by_hand(block.attn, x, x, torch.zeros(LENGTH, LENGTH), strength=strength))
    torch.testing.assert_close(block(x, y), by_hand(block.attn, x, y, torch.zeros(LENGTH, OTHER), strength=strength))
    block.options = {"attn_mask": torch.full((LENGTH, LENGTH), -math.inf).triu(1)}
    torch.testing.assert_close(block(x), by_hand(block.attn, x, x, block.options["attn_mask"], strength=strength))
    block.options = {}
    seam.write_strength(0)
    assert torch.equal(block(x), before)
    seam.uninstall()
    assert torch.equal(block(x), before)


def test_two_seams_add_to_one_softmax() -> None:
    block, x = Block(), random(2, LENGTH, 8, seed=3)
    joined(block)
    joined(block, shift=0.5)
    pairs = ((KEYS, VALUES), (KEYS + 0.5, VALUES - 0.5))
    torch.testing.assert_close(block(x), by_hand(block.attn, x, x, torch.zeros(LENGTH, LENGTH), strength=1, pairs=pairs))
    assert _get_current_function_mode() is None


def test_no_mode_is_left_after_an_error() -> None:
    block, x = Block(), random(2, LENGTH, 8, seed=3)
    joined(block)
    expected = block(x)
    with pytest.raises(RuntimeError, match="shapes"):
        block(x[..., :3])
    assert _get_current_function_mode() is None
    assert torch.equal(block(x), expected)


def test_arguments_that_are_not_supported() -> None:
    block, x = Block(), random(2, LENGTH, 8, seed=3)
    joined(block)
    block.options = {"key_padding_mask": torch.zeros(2, LENGTH, dtype=torch.bool)}
    with raises(HostChanged, given=("key_padding_mask",)):
        block(x)
    with AddedKeys(KEYS, VALUES, None), raises(HostChanged, given=(2, 1, OTHER, CHANNELS), expected=(HEADS, TOKENS, CHANNELS)):
        F.scaled_dot_product_attention(
            random(2, HEADS, LENGTH, CHANNELS), random(2, 1, OTHER, CHANNELS), random(2, 1, OTHER, CHANNELS)
        )


def test_attention_that_is_computed_in_another_way() -> None:
    """timm's option for fused attention is set during the call only; a module that computes its own softmax is an error."""

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x

    with raises(HostChanged, where="attn.out", given="Own"):
        owner = nn.ModuleDict({"attn": Own()})
        joined(owner)
        owner["attn"](random(1, 2, 8))
    attn: Any = timm.layers.Attention(8, HEADS).double().eval()
    attn.fused_attn = False
    plain, x, owner = copy.deepcopy(attn), random(2, LENGTH, 8, seed=3), nn.ModuleDict({"attn": attn})
    joined(owner)
    got = attn(x)
    assert attn.fused_attn is False
    q, k, v = plain.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    expected = plain.proj(written_out(q, k, v, torch.zeros(LENGTH, LENGTH), 1).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, expected)
    assert calls_sdpa(attn)
    assert not calls_sdpa(timm.layers.DiffAttention(8, 2))
    assert not calls_sdpa(timm.models.xcit.XCA(8, 2))  # keys are channels
    assert not calls_sdpa(Own())
    mochi: Any = hosts.get("diffusers_dit")().tiny()["mochi"]()  # one call for each sample
    assert not calls_sdpa(mochi.transformer_blocks[0].attn1)


class OfInput(Added):
    """Keys and values times the mean of the first channel of a sample's tokens."""

    def keys_values_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        factor = x[..., 0].mean(1)[:, None, None, None]
        return factor * self.keys, factor * self.values


@pytest.mark.parametrize("batch_first", [True, False])
def test_keys_and_values_of_the_input(batch_first: bool) -> None:
    """Each sample has its own, whatever the order of the dimensions is; the argument may be passed by name."""
    torch.manual_seed(0)
    owner: Any = nn.ModuleDict({"attn": nn.MultiheadAttention(8, HEADS, batch_first=batch_first).double().eval()})
    attn, x = owner["attn"], random(2, LENGTH, 8, seed=3)
    joined(owner, adapter=OfInput())
    given = x if batch_first else x.transpose(0, 1)
    got = attn(query=given, key=given, value=given, need_weights=False)[0]
    for i, sample in enumerate(x):
        factor = sample[:, 0].mean()
        pairs = ((factor * KEYS, factor * VALUES),)
        expected = by_hand(attn, sample[None], sample[None], torch.zeros(LENGTH, LENGTH), strength=1, pairs=pairs)
        torch.testing.assert_close((got if batch_first else got.transpose(0, 1))[i : i + 1], expected)


def test_keys_of_other_samples() -> None:
    """Keys and values of two samples in an attention of three, as in a module that changes the batch."""
    keys, q = KEYS.expand(2, -1, -1, -1), random(3, HEADS, LENGTH, CHANNELS)
    with AddedKeys(keys, keys, None), raises(HostChanged, given=tuple(q.shape), expected=tuple(keys.shape)):
        F.scaled_dot_product_attention(q, q, q)
