"""SparseAdapter: scores, kept entries, outputs and gradients against a bottleneck with explicit masks; counts and bad input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import veneer
from tests.methods.selections import losses, tiny
from tests.raising import raises
from veneer.injection import Attachment, attach
from veneer.injection.errors import EmptySelection, LoadError, NotSelected, OptionError
from veneer.methods.additive.bottleneck._pruned_bottleneck import erdos_renyi_counts, uniform_counts
from veneer.methods.additive.bottleneck.sparse_adapter import SparseBottleneck
from veneer.testing.case import loss

MODELS = [("timm_vit", "vit"), ("diffusers_dit", "dit"), ("open_clip", "vit"), ("timm_convnext", "convnext")]
OPTIONS: dict[str, Any] = {"bottleneck": 6, "keep_ratio": 0.3}


class Dense(nn.Module):
    """y + U ReLU(D y + b_d) + b_u at the output of a module, with channels last or first."""

    def __init__(self, down: Tensor, up: Tensor, channels_first: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())
        self.down_bias, self.up_bias = nn.Parameter(down.new_zeros(len(down))), nn.Parameter(up.new_zeros(len(up)))
        self.channels_first = channels_first

    def forward(self, module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        z = y.movedim(1, -1) if self.channels_first else y
        z = z + torch.relu(z @ self.down.T + self.down_bias) @ self.up.T + self.up_bias
        return z.movedim(-1, 1) if self.channels_first else z


def beside(model: nn.Module, tuned: Attachment) -> tuple[nn.Module, list[Dense]]:
    """A copy of the bare model with a dense bottleneck at each site, with the initial matrices of the adapter there."""
    plain = copy.deepcopy(model).requires_grad_(False)
    hooks = []
    for site, adapter in tuned.parts.values():
        dense = Dense(adapter.down.initial, adapter.up.initial, site.layout == "NCHW")
        port = site.write
        module = plain.get_submodule(port.path)
        if port.side == "in":
            module.register_forward_pre_hook(lambda m, x, dense=dense: (dense(m, (), x[0]), *x[1:]))
        else:
            module.register_forward_hook(dense)
        hooks.append(dense)
    return plain, hooks


def in_order(adapters: list[Any], matrices: list[Tensor]) -> list[Tensor]:
    """Matrices of (down, up) pairs in the order of the shared entries."""
    numbers = [adapter.own.numbers[matrix.name] for adapter in adapters for matrix in (adapter.down, adapter.up)]
    return [matrix for _, matrix in sorted(zip(numbers, matrices, strict=True), key=lambda pair: pair[0])]


def matrices_of(denses: list[Dense]) -> Iterator[nn.Parameter]:
    return (matrix for dense in denses for matrix in (dense.down, dense.up))


@pytest.mark.parametrize(("host", "name"), MODELS)
def test_snip_selection_outputs_and_gradients_are_those_of_masked_bottlenecks(host: str, name: str) -> None:
    model, samples = tiny(host, name)
    bare = copy.deepcopy(model)
    torch.manual_seed(1)
    tuned = attach(model, "sparse_adapter", **OPTIONS)
    adapters: list[Any] = [adapter for _, adapter in tuned.parts.values()]
    plain, denses = beside(bare, tuned)
    for sample in samples:
        loss(plain, sample).backward()
    scores = [(matrix.grad * matrix).abs().detach() for matrix in matrices_of(denses)]
    tuned.select(losses(model, samples))
    entries = adapters[0].own
    flat = torch.cat([score.flatten() for score in in_order(adapters, scores)])
    assert len(entries.values) == int(0.3 * len(flat))
    assert entries.indices.tolist() == sorted(flat.topk(len(entries.values)).indices.tolist())
    initial = torch.cat([matrix.detach().flatten() for matrix in in_order(adapters, list(matrices_of(denses)))])
    assert torch.equal(entries.values, initial[entries.indices.long()])
    assert adapters[0].initial_down is None

    torch.manual_seed(2)
    for parameter in tuned.parameters():
        nn.init.normal_(parameter, std=0.3)
    masked = torch.zeros_like(flat).index_copy(0, entries.indices.long(), entries.values.detach())
    pieces = masked.split([matrix.numel() for matrix in in_order(adapters, list(matrices_of(denses)))])
    with torch.no_grad():
        for matrix, piece in zip(in_order(adapters, list(matrices_of(denses))), pieces, strict=True):
            matrix.copy_(piece.view_as(matrix))
        for dense, adapter in zip(denses, adapters, strict=True):
            dense.down_bias.copy_(adapter.down_bias)
            dense.up_bias.copy_(adapter.up_bias)
    got, expected = loss(model, samples[0]), loss(plain, samples[0])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    of_matrices = torch.autograd.grad(expected, in_order(adapters, list(matrices_of(denses))), retain_graph=True)
    of_biases = torch.autograd.grad(expected, [bias for dense in denses for bias in (dense.down_bias, dense.up_bias)])
    biases = [bias for adapter in adapters for bias in (adapter.down_bias, adapter.up_bias)]
    gradients = torch.autograd.grad(got, [entries.values, *biases])
    whole = torch.cat([gradient.flatten() for gradient in of_matrices])
    torch.testing.assert_close(gradients, (whole[entries.indices.long()], *of_biases), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("score", ["magnitude", "synflow"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_scores_without_data(score: str, scope: str) -> None:
    model, _ = tiny("timm_vit", "vit")
    tuned = attach(model, "sparse_adapter", score=score, scope=scope, **OPTIONS)
    adapters: list[Any] = [adapter for _, adapter in tuned.parts.values()]
    scores = []
    for adapter in adapters:
        down, up = (matrix.initial.clone().abs().requires_grad_() for matrix in (adapter.down, adapter.up))
        if score == "synflow":
            (torch.ones(len(up), dtype=up.dtype) @ down.T @ up.T).mean().backward()
        scores += [(matrix * matrix.grad if score == "synflow" else matrix).detach() for matrix in (down, up)]
    tuned.select(iter(()))
    entries, ordered = adapters[0].own, in_order(adapters, scores)
    if scope == "global":
        expected = torch.cat([s.flatten() for s in ordered]).topk(len(entries.values)).indices
    else:
        counts = uniform_counts([s.numel() for s in ordered], len(entries.values))
        starts = entries.starts[:-1]
        tops = [start + s.flatten().topk(n).indices for s, n, start in zip(ordered, counts, starts, strict=True)]
        expected = torch.cat(tops)
    assert entries.indices.tolist() == sorted(expected.tolist())


def test_random_entries_and_those_of_erdos_renyi() -> None:
    chosen = []
    for score, seed in (("random", 0), ("random", 0), ("random", 1), ("erdos_renyi", 0)):
        model, _ = tiny("timm_vit", "vit")
        tuned = attach(model, "sparse_adapter", score=score, **OPTIONS)
        torch.manual_seed(seed)
        tuned.select(iter(()))
        chosen.append(next(iter(tuned.parts.values()))[1].own)
    sets = [entries.indices.tolist() for entries in chosen]
    assert sets[0] == sets[1] != sets[2]
    sizes = {last - first for first, last in zip(chosen[3]._bounds, chosen[3]._bounds[1:], strict=False)}
    assert max(sizes) - min(sizes) <= 1  # matrices of one size


def test_numbers_of_entries_of_each_matrix() -> None:
    """Proportional to n + m, at most n·m, with the exact sum."""
    assert uniform_counts([10, 30, 61], 10) == [1, 3, 6]
    counts = erdos_renyi_counts([(4, 16), (4, 96), (4, 16)], 60)
    assert counts == [9, 43, 8]
    counts = erdos_renyi_counts([(1, 2), (10, 20), (10, 30)], 142)
    assert counts == [2, 60, 80]
    assert erdos_renyi_counts([(2, 2), (3, 3)], 13) == [4, 9]


def test_counts() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    tuned = attach(vit, "sparse_adapter")
    assert tuned.report().trainable == 491_827
    assert tuned.report().summary == "471,859 of 2,359,296 entries kept"
    tuned.detach()
    large = attach(vit, "sparse_adapter", bottleneck=256, keep_ratio=0.05)
    assert large.report().summary.startswith("471,859 of 9,437,184")


def test_a_file_has_the_kept_entries(tmp_path: Path) -> None:
    model, samples = tiny("timm_vit", "vit")
    tuned = attach(model, "sparse_adapter", **OPTIONS)
    with raises(NotSelected, given="sparse_adapter", expected="select"):
        loss(model, samples[0])
    with raises(EmptySelection, where="sparse_adapter", given=0):
        tuned.select(iter(()))
    tuned.select(losses(model, samples))
    path = tuned.save(tmp_path / "sparse")
    other, _ = tiny("timm_vit", "vit")
    loaded = veneer.load(other, path)
    assert loaded.is_selected
    assert torch.equal(loss(other, samples[0]), loss(model, samples[0]))
    flipped = {k: t.flip(0) if k.endswith("indices") else t for k, t in tuned.state_dict().items()}
    with raises(LoadError, where=next(iter(loaded.parts))):
        loaded.load_state_dict(flipped)


@pytest.mark.parametrize(
    ("option", "given"),
    [
        *[("bottleneck", 0), ("keep_ratio", 0.0), ("keep_ratio", 1.5), ("score", "grasp")],
        *[("scope", "block"), ("samples", 0), ("std", 0.0)],
    ],
)
def test_bad_options(option: str, given: Any) -> None:
    with raises(OptionError, method="sparse_adapter", option=option, given=given):
        SparseBottleneck(**{option: given})
