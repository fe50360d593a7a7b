"""Several forward passes of a batch: the same inputs, other experts, exact with gradient checkpointing and after a resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.classification.objectives.multi_label import MULTI_LABEL
from veneer.classification.train.batches import ClassifyingLoss, Order
from veneer.injection import Attachment, attach, hosts
from veneer.training import param_groups
from veneer.training.loop.seeds import generator
from veneer.training.loop.trainer import TrainConfig, Trainer
from veneer.training.objective.consistency import squared_distance, symmetric_binary_kl, symmetric_kl
from veneer.training.objective.forward_passes import ForwardPasses

SEED = 3


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Attachment]:
    """A small ViT in training mode with AdaMix, its experts unequal."""
    torch.manual_seed(0)
    model: Any = hosts.get("timm_vit")().tiny()["vit"]().to(dtype)
    tuned = attach(model, "adamix", bottleneck=3, share_up=False, **options)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.train(), tuned


def images(rows: Sequence[int] = range(4), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.stack([torch.randn(3, 32, 32, generator=generator("image", row)) for row in rows]).to(dtype)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def test_the_distances_written_out() -> None:
    a, b = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind(0)
    p, q = a.softmax(1), b.softmax(1)
    torch.testing.assert_close(symmetric_kl(a, b), (kl(p, q) + kl(q, p)) / 2)
    on, off = [torch.stack([t.sigmoid(), 1 - t.sigmoid()], -1) for t in (a, b)]
    torch.testing.assert_close(symmetric_binary_kl(a, b), ((kl(on, off) + kl(off, on)) / 2).mean(1))
    torch.testing.assert_close(squared_distance(a, b), ((a - b) ** 2).float().mean(1))
    (gradient,) = torch.autograd.grad(symmetric_kl(a, b).sum(), a)
    torch.testing.assert_close(gradient, (p - q) / 2, msg="of KL(q ‖ p) alone: the targets have no gradient")


def gradients(checkpointing: bool) -> dict[str, Tensor]:
    model, tuned = adapted(consistency=2.0)
    model.set_grad_checkpointing(checkpointing)
    first, extra = ForwardPasses([tuned], SEED)(5, lambda: model(images()), symmetric_kl)
    assert extra is not None
    (first.square().mean() + extra.mean()).backward()
    return {key: p.grad for key, p in tuned.named_parameters() if p.grad is not None}


def test_recomputed_blocks_use_the_experts_of_their_pass() -> None:
    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, msg=lambda text, at=key: f"{at}: {text}")


def test_the_loss_is_that_of_the_first_pass_and_the_distance_to_the_second() -> None:
    model, tuned = adapted(consistency=2.0)
    first, extra = ForwardPasses([tuned], SEED)(5, lambda: model(images()), symmetric_kl)
    outputs = []
    for number in (0, 1):
        tuned.begin_pass(SEED, 5, number)
        outputs.append(model(images()))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    torch.testing.assert_close(first, outputs[0])
    torch.testing.assert_close(extra, 2 * symmetric_kl(*outputs))
    with torch.no_grad():
        tuned.begin_pass(SEED, 5, 1)
        once, none = ForwardPasses([tuned], SEED)(5, lambda: model(images()), symmetric_kl)
    assert none is None
    torch.testing.assert_close(once, outputs[1], msg="without gradients nothing is sampled")


def test_a_method_without_passes_has_one() -> None:
    model: Any = hosts.get("timm_vit")().tiny()["vit"]()
    tuned, calls = attach(model, "lora"), list[int]()
    output, extra = ForwardPasses([tuned], SEED)(0, lambda: calls.append(1) or torch.ones(2), symmetric_kl)
    assert (calls, extra, output.tolist()) == ([1], None, [1.0, 1.0])


@pytest.mark.parametrize("several", [False, True])
def test_the_loss_of_a_classifier(several: bool) -> None:
    model, tuned = adapted(consistency=0.5)
    labels = torch.eye(10, dtype=torch.float64)[:6] if several else torch.arange(6)
    given: dict[str, Any] = {"objective": MULTI_LABEL} if several else {}
    order = Order(range(6), 0)

    def inputs(samples: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        places = [place for _, place in samples]
        return images(places), labels[places]

    loss = ClassifyingLoss(model, inputs, order, 4, passes=ForwardPasses([tuned], SEED), **given)
    got = loss(1, [0, 2])
    x = inputs([order.at(4), order.at(6)])[0]
    outputs = []
    for number in (0, 1):
        tuned.begin_pass(SEED, 1, number)
        outputs.append(model(x).float())
    distance = (symmetric_binary_kl if several else symmetric_kl)(*outputs)
    plain = ClassifyingLoss(lambda x: outputs[0], inputs, order, 4, **given)(1, [0, 2])
    torch.testing.assert_close(got, plain + 0.5 * distance.mean())
    assert distance.mean() > 1e-4


def trainer(folder: Path | None) -> tuple[Trainer, Attachment]:
    model, tuned = adapted(torch.float32)
    passes = ForwardPasses([tuned], SEED)

    def loss(step: int, rows: list[int]) -> Tensor:
        logits, extra = passes(step, lambda: model(images([9 * step + row for row in rows], torch.float32)), symmetric_kl)
        assert extra is not None
        return nn.functional.cross_entropy(logits, torch.tensor(rows)) + extra.mean()

    config = TrainConfig(steps=6, batch=2, learning_rate=0.01, checkpoint_every=3, tracker="none", seed=SEED)
    groups = [{"params": list(tuned.parameters())}]
    return Trainer(config, groups, loss, param_groups.named_state([tuned]), folder), tuned


def test_a_resumed_run_is_bitwise_the_same_and_checkpoints_have_all_experts(tmp_path: Path) -> None:
    whole, all_steps = trainer(None)
    whole.fit()
    first, _ = trainer(tmp_path)
    first.on_step = lambda progress: first.stop() if progress.step == 2 else None
    assert first.fit().stopped
    second, resumed = trainer(tmp_path)
    assert second.fit(resume=True).resumed_from == 3
    assert second.losses == whole.losses
    for key, value in all_steps.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)
        assert value.shape[0] == 4
    param_groups.finalize([resumed])
    assert {value.shape[0] for value in resumed.state_dict().values()} == {1}
