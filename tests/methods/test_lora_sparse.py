"""LoRA-Sparse: top keys by low-rank scores and the order-mimic loss, against blocks that are written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.methods.bottlenecks import blocks_written_out, picture, random, stirred, tiny
from tests.methods.dense import check_causal_text
from tests.raising import raises
from veneer.injection import HostChanged, StateError, attach
from veneer.injection.attention_sites import SelfAttentionSite
from veneer.injection.errors import DeadSite, OptionError
from veneer.injection.seams.attention_call import AttentionCall
from veneer.injection.seams.key_choice_seam import ChosenKeys
from veneer.injection.sites import WeightSite
from veneer.methods.additive.attention.lora_sparse import KeyPredictor, LoRASparse

MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "float": {"attn_mask": random(6, 6, seed=5)},
    "bool": {"attn_mask": (random(6, 6, seed=5) > -0.5) | torch.eye(6, dtype=torch.bool)},
    "causal": {"is_causal": True},
}


def predictor(heads: int = 2, width: int = 5, rank: int = 2, keep: float = 0.5) -> KeyPredictor:
    layer = WeightSite(name="w", role="attn.q", path="w", d_out=width, d_in=width)
    layers: dict[str, Any] = dict.fromkeys(("query", "key", "value", "out"), layer)
    site = SelfAttentionSite(name="attn.module", role="attn.module", path="attn", width=width, heads=heads, **layers)
    torch.manual_seed(0)
    return LoRASparse(rank=rank, keep=keep).build(site).double()


def rows_of(adapter: Any, x: Tensor, q: Tensor, k: Tensor, mask: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Attention weights (heads, n, n) of one image, and the sum of the KL divergences; each head and query on its own."""
    weights, divergence, rank = torch.zeros(*q.shape[:2], len(x), dtype=x.dtype), x.new_zeros(()), adapter.rank
    for h in range(len(q)):
        a_q, a_k = (a[h * rank : (h + 1) * rank] for a in (adapter.query, adapter.key))
        for i in range(len(x)):
            exact = torch.stack([q[h, i] @ k[h, j] / math.sqrt(q.shape[-1]) + mask[i, j] for j in range(len(x))])
            low = torch.stack([(a_q @ x[i]) @ (a_k @ x[j]) / math.sqrt(rank) + mask[i, j] for j in range(len(x))])
            read = [j for j in range(len(x)) if mask[i, j] > -math.inf]
            ranked = sorted(read, key=lambda j, low=low: -low[j].item())[: math.ceil(adapter.keep * len(x))]
            factor = torch.tensor([1.0 if j in ranked else 1.0 - strength for j in range(len(x))])
            unnormalized = exact.exp() * factor
            weights[h, i] = unnormalized / unnormalized.sum()
            p, guess = (s[read].softmax(-1) for s in (exact.detach(), low))
            divergence = divergence + (p * (p / guess).log()).sum()
    return weights, divergence


def as_numbers(options: dict[str, Any]) -> Tensor:
    mask = options.get("attn_mask", torch.ones(6, 6, dtype=torch.bool).tril() if options else torch.zeros(6, 6))
    return torch.zeros(6, 6).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_written_out(mask: str, strength: float) -> None:
    """Outputs and gradients of queries, keys and values; the loss and its gradients, which reach A_q and A_k alone."""
    adapter, x, options = predictor(), random(3, 6, 5).requires_grad_(), dict(MASKS[mask])
    if mask == "float":
        options["attn_mask"] = options["attn_mask"].clone().requires_grad_()  # as a relative position bias
    adapter.strength = torch.tensor(strength, dtype=torch.float64)
    q, k, v = (random(3, 2, 6, 4, seed=s).requires_grad_() for s in (1, 2, 3))
    with ChosenKeys(adapter, x):
        got = F.scaled_dot_product_attention(q, k, v, **options)
    rows = [rows_of(adapter, x[b], q[b], k[b], as_numbers(MASKS[mask]), strength) for b in range(3)]
    expected = torch.stack([weights @ v[b] for b, (weights, _) in enumerate(rows)])
    torch.testing.assert_close(got, expected)
    assert (got - F.scaled_dot_product_attention(q, k, v, **MASKS[mask])).abs().max() > 1e-3
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)
    loss, written = adapter.take_loss(), torch.stack([divergence for _, divergence in rows]).sum() / (3 * 2 * 6)
    assert loss is not None
    torch.testing.assert_close(loss, written)
    others = [x, q, k, *(m for m in options.values() if isinstance(m, Tensor) and m.requires_grad)]
    assert {*torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True)} == {None}
    parameters = list(adapter.parameters())
    for a, b in zip(*(torch.autograd.grad(y, parameters) for y in (loss, written)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_vit_written_out() -> None:
    """All blocks with other adapters: the output, and the penalty, which is the mean over blocks."""
    bare, model = tiny("vit"), tiny("vit")
    tuned = attach(model, "lora_sparse", rank=2, keep=0.3, order_weight=2.0)
    adapters: dict[str, Any] = {**stirred(tuned)}
    assert list(adapters) == ["blocks.0.attn.module", "blocks.1.attn.module"]
    losses = []

    def block(depth: int, b: Any, x: Tensor) -> Tensor:
        normed = b.norm1(x)
        heads = b.attn.num_heads
        q, k, v = b.attn.qkv(normed).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        none = torch.zeros(x.shape[1], x.shape[1])
        rows = [rows_of(adapters[f"blocks.{depth}.attn.module"], normed[i], q[i], k[i], none, 1.0) for i in range(len(x))]
        losses.append(torch.stack([divergence for _, divergence in rows]).sum() / (len(x) * heads * x.shape[1]))
        attended = torch.stack([weights @ v[i] for i, (weights, _) in enumerate(rows)])
        x = x + b.attn.proj(attended.transpose(1, 2).flatten(2))
        return x + b.mlp(b.norm2(x))

    image = picture()[:, :, :32, :32]
    expected, got = blocks_written_out(bare, block, image), model.train()(image)
    torch.testing.assert_close(got, expected)
    assert (expected - bare(image)).abs().max() > 1e-3
    torch.testing.assert_close(tuned.penalty(), 2.0 * torch.stack(losses).mean())


def test_all_keys_are_the_host() -> None:
    bare, model = tiny("vit"), tiny("vit")
    stirred(attach(model, "lora_sparse", keep=1.0))
    torch.testing.assert_close(model(picture()), bare(picture()))


def test_the_text_tower_of_a_clip_stays_causal() -> None:
    check_causal_text("lora_sparse")


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_order_of_dimensions(batch_first: bool) -> None:
    """A MultiheadAttention reads the same tokens in both orders."""
    torch.manual_seed(0)
    attn: Any = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    x, adapter = random(3, 6, 8), predictor(width=8)
    with torch.no_grad(), ChosenKeys(adapter, x):
        y = x if batch_first else x.transpose(0, 1)
        got = attn(y, y, y, need_weights=False)[0]
    q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    none = torch.zeros(6, 6)
    attended = torch.stack([rows_of(adapter, x[b], q[b], k[b], none, 1.0)[0] @ v[b] for b in range(3)])
    torch.testing.assert_close(got if batch_first else got.transpose(0, 1), attn.out_proj(attended.transpose(1, 2).flatten(2)))


def found_keys(model: Any, adapter: KeyPredictor, image: Tensor) -> float:
    """Share of the keys with the highest exact scores that the first block reads."""
    block, tokens = model.blocks[0], []
    with torch.no_grad(), block.attn.register_forward_pre_hook(lambda module, args: tokens.append(args[0])):
        model(image)
        q, k, _ = block.attn.qkv(tokens[0]).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        exact = q @ k.mT * q.shape[-1] ** -0.5
        chosen = adapter.choose(tokens[0], torch.zeros(exact.shape[-1]), lambda: exact)
    best = torch.zeros_like(exact).scatter(-1, exact.topk(int(chosen[0, 0, 0].sum()), -1).indices, 1.0) > 0
    return (chosen & best).sum().item() / best.sum().item()


def test_training_finds_the_best_keys() -> None:
    """The order-mimic loss alone: more of the keys with the highest scores are read than by chance, on new images, too."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=96, num_classes=0)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(8)  # attention as unequal as that of a trained model
    tuned = attach(model, "lora_sparse", rank=8, keep=0.25)
    (part,) = tuned.parts.values()
    adapter: Any = part[1]
    new = torch.randn(2, 3, 96, 96)
    before = found_keys(model, adapter, new)
    optimizer = torch.optim.Adam(tuned.parameters(), 1e-2)
    for _ in range(60):
        model(torch.randn(4, 3, 96, 96))
        penalty = tuned.penalty()
        assert penalty is not None
        penalty.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = found_keys(model, adapter, new)
    assert before < 0.3, "a quarter by chance"
    assert after > 0.4


def test_the_loss_is_recorded_once() -> None:
    """Without a forward pass in training mode the penalty is an error, not a run that trains nothing."""
    model = tiny("vit")
    tuned = attach(model, "lora_sparse")
    with raises(StateError, where="blocks.0.attn.module", given="no loss"):
        tuned.penalty()
    model(picture())
    with torch.no_grad():
        model.train()(picture())
    with raises(StateError, given="no loss"):
        tuned.penalty()
    model(picture())
    assert tuned.penalty() is not None
    with raises(StateError, given="no loss"):
        tuned.penalty()


def test_no_penalty_at_strength_0_and_of_frozen_adapters() -> None:
    model = tiny("vit").train()
    tuned = attach(model, "lora_sparse")
    with tuned.enabled(False):
        model(picture())
        assert tuned.penalty() is None
    model(picture())
    for p in tuned.parameters():
        p.requires_grad_(False)
    assert tuned.penalty() is None


def test_recomputed_blocks_record_nothing() -> None:
    """With gradient checkpointing, the backward pass runs the blocks again, but leaves no loss behind."""
    model: Any = tiny("vit").train()
    model.set_grad_checkpointing()
    tuned = attach(model, "lora_sparse")
    attach(model, "lora", where="mlp")
    out = model(picture())
    penalty = tuned.penalty()
    assert penalty is not None
    (out.square().sum() + penalty).backward()
    with raises(StateError, given="no loss"):
        tuned.penalty()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_queries_that_read_no_key(dtype: torch.dtype) -> None:
    """A query of padding, of whose keys all are masked, counts as 0; in every dtype and form of mask the gradients are finite."""
    adapter, x = predictor().to(dtype), random(1, 6, 5).to(dtype)
    q, k, v = (random(1, 2, 6, 4, seed=s).to(dtype) for s in (1, 2, 3))
    read = torch.ones(6, 6, dtype=torch.bool).tril()
    read[2] = False
    lowest = torch.zeros(6, 6, dtype=dtype).masked_fill(~read, torch.finfo(dtype).min)
    losses = []
    for mask in (read, lowest):
        with ChosenKeys(adapter, x):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        loss = adapter.take_loss()
        assert loss is not None
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(adapter.parameters())))
        losses.append(loss)
    rest = [0, 1, 3, 4, 5]
    wide = adapter.double()
    exact = (q.double() @ k.double().mT / 2).masked_fill(~read, -math.inf)[0][:, rest]
    scores = wide.scores(x.double()).masked_fill(~read, -math.inf)[0][:, rest]
    p = exact.softmax(-1)
    divergence = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - scores.log_softmax(-1)), 0.0).sum()
    torch.testing.assert_close(losses[0].double(), divergence / 12, rtol=2e-2, atol=1e-4)


def test_scores_of_autocast_are_in_single_precision() -> None:
    q, k = random(1, 2, 6, 4, seed=1).float(), random(1, 2, 6, 4, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = AttentionCall(q, k, k).scores()
    torch.testing.assert_close(got, q @ k.mT / 2)


@pytest.mark.parametrize(("keep", "tokens", "expected"), [(0.07, 100, 7), (0.071, 100, 8), (0.01, 6, 1), (1.0, 6, 6)])
def test_the_share_is_rounded_up(keep: float, tokens: int, expected: int) -> None:
    adapter, x = predictor(keep=keep).eval(), random(1, tokens, 5)
    chosen = adapter.choose(x, torch.zeros(1, tokens), lambda: x)
    assert set(chosen.sum(-1).flatten().tolist()) == {expected}


def test_an_export_takes_any_batch_size() -> None:
    model = tiny("vit")
    tuned = attach(model, "lora_sparse")
    stirred(tuned)
    one, image = picture()[:1], picture()
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(model, (image,), dynamic_shapes=({0: batch},)).module()
        more = torch.cat([image, one])
        torch.testing.assert_close(exported(more), model(more))


def test_a_module_that_is_not_called_is_dead() -> None:
    """The probe names sites from whose choice no loss comes."""
    model: Any = tiny("vit")
    tuned = attach(model, "lora_sparse")
    model.blocks[1].forward = lambda x, **_: x
    with raises(DeadSite, given=("blocks.1.attn.module:query", "blocks.1.attn.module:key")):
        tuned.probe()


def test_other_queries_than_the_tokens_are_rejected() -> None:
    with raises(HostChanged, where="attention", given=(1, 4, 9), expected=(1, 6, 6)), ChosenKeys(predictor(), random(1, 6, 5)):
        F.scaled_dot_product_attention(random(1, 2, 4, 4), random(1, 2, 9, 4), random(1, 2, 9, 4))


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_wrong_strengths(strength: float) -> None:
    tuned = attach(tiny("vit"), "lora_sparse")
    with raises(StateError, given=strength, expected=(0, 1)):
        tuned.scale = strength


@pytest.mark.parametrize(("option", "given"), [("rank", 0), ("keep", 0.0), ("keep", 1.1), ("order_weight", 0.0)])
def test_wrong_options(option: str, given: Any) -> None:
    with raises(OptionError, method="lora_sparse", option=option, given=given):
        LoRASparse(**{option: given})


@pytest.mark.parametrize(("options", "expected"), [({}, 1_769_472), ({"rank": 2}, 442_368)])
def test_counts(options: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        assert attach(vit, "lora_sparse", **options).report().trainable == expected
