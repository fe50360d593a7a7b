"""EVP beside its authors' training loop and label map."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.parity.measure import Row, largest_difference, randn
from tests.parity.models import vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach
from veneer.methods.prompt.pixels._label_map import most_frequent
from veneer.methods.prompt.pixels._pixels import resize

ORACLE = Repository("UCSC-VLAA/EVP", "96b7131bab409b9817f80da4f555b35113a1b5a6")
METHODS = ("evp",)
SIDE, INNER, RATE, STEPS = 32, 24, 0.7, 6
INDEX = [3, 0, 4]
LABELS = torch.tensor([0, 2, 1, 1])


def rows() -> list[Row]:
    """The prompt of 32-pixel images after each of six steps with another batch, and 50 label maps."""
    model, bare = vits()
    text = "images are resized in the adapter; labels are chosen with the border, in the code without it and not normalized"
    return [
        Row("evp", f"prompts after 1 to {STEPS} steps of SGD", largest_difference(_prompts(model, bare)), deviations=text),
        Row("evp", "label maps of 50 tables", largest_difference(_label_maps())),
    ]


def _images(step: int) -> Tensor:
    return randn(len(LABELS), 3, SIDE, SIDE, seed=step)


def _prompts(model: Any, bare: nn.Module) -> list[tuple[Tensor, Tensor]]:
    tuned = attach(model, "evp", classes=len(INDEX))
    ours: Any = next(adapter for _, adapter in tuned.parts.values() if hasattr(adapter, "prompt"))
    labels: Any = next(adapter for _, adapter in tuned.parts.values() if hasattr(adapter, "index"))
    labels.index.copy_(torch.tensor(INDEX))
    mean, std = (values.double().unsqueeze(2) for values in (ours.mean, ours.std))
    optimizer = torch.optim.SGD(tuned.parameters(), lr=RATE)
    theirs, step_of_theirs = _official(bare, lambda x: (x - mean) / std)
    pairs, middle = [], torch.zeros(3, INNER, INNER)
    for step in range(STEPS):
        cross_entropy(model(_images(step)), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
        step_of_theirs(resize(_images(step), (INNER, INNER), "bicubic") * std + mean)
        pairs.append((ours.border.around(ours.prompt.detach().clone(), middle), theirs.perturbation.detach().clone()))
    return pairs


def _official(model: nn.Module, normalize: Callable[[Tensor], Tensor]) -> tuple[Any, Callable[[Tensor], Any]]:
    topk = ORACLE.definitions("util/tool.py", "topk").topk
    code = ORACLE.definitions(
        "main.py", "Pertubation_non_CLIP", "train_with_prompt", replace={"224": str(SIDE), ".float()": ".double()"},
        topk=lambda *arguments, ks: topk(*arguments, ks=(1, 2)), tqdm=lambda items: items, time=time,
        datetime=options(timedelta=lambda seconds: seconds), print=lambda *text: None,
    )  # fmt: skip
    pad = (SIDE - INNER) // 2
    prompt = code.Pertubation_non_CLIP(pad, pad, model)
    optimizer = options(param_groups=[{"lr": RATE}])

    def run(images: Tensor) -> None:
        code.train_with_prompt(
            options(non_CLIP=True), 0, [(images, LABELS)], prompt, None, (pad,) * 4, cross_entropy, optimizer, normalize, "cpu",
            INDEX,
        )  # fmt: skip

    return prompt, run


class Predictions(list[Any]):
    """Pairs of logits (1, 1, 9) and label, the same number for each of five classes."""

    classes = range(5)

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for label in self.classes:
            for predicted in torch.randint(0, 9, (8,), generator=generator):
                self.append((torch.eye(9)[predicted].unsqueeze(0), label))


def _label_maps() -> list[tuple[Tensor, Tensor]]:
    code = ORACLE.definitions(
        "util/get_index.py", "get_index", DataLoader=lambda data, **o: data, tqdm=list, print=lambda *t: None
    )
    pairs = []
    for seed in range(50):
        table, data = torch.zeros(9, 5, dtype=torch.int64), Predictions(seed)
        for logits, label in data:
            table[logits.argmax(), label] += 1
        theirs = torch.stack([mode.values for mode in code.get_index(data, nn.Identity(), "cpu")])
        pairs.append((most_frequent(table), theirs))
    return pairs
