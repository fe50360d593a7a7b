"""PPT: soft prompts that are pre-trained on images without labels, by crop matching and pseudo-labels, and then tuned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.sites import Site

from ._prompts import TextPrompts
from .prompt_tuning import PromptTokens, PromptTuning

PASSES = 3
"""Forward passes of a pre-training step: two crops with the prompts, and the first crop without them."""


class PretrainedPrompts(Adapter):
    """Base of prompts that some forward passes leave out.

    Attributes:
        pretrains: buffer (), 1 while the prompts are pre-trained. `leaves_out`: the current training pass has no prompts.
    """

    pretrains: Tensor
    leaves_out: bool = False
    training_buffers: ClassVar[tuple[str, ...]] = ("pretrains",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("pretrains", torch.ones(()), persistent=False)

    @property
    def is_bare(self) -> bool:
        """True if the current pass has no prompts."""
        return self.training and self.leaves_out


class PPTTokens(PretrainedPrompts, PromptTokens):
    """Prompts beside the patches of an image."""

    def insert(self, tokens: Tensor) -> Tensor:
        """(B, N, width) to (B, N + p, width)."""
        return tokens if self.is_bare else super().insert(tokens)

    def remove(self, tokens: Tensor) -> Tensor:
        """(B, N + p, width) to (B, N, width)."""
        return tokens if self.is_bare else super().remove(tokens)


class PPTText(PretrainedPrompts, TextPrompts):
    """Vectors in the prompts of classes."""

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the image features; y: the class weights without the vectors."""
        return y if self.is_bare else super().output(x, y)


@dataclass(frozen=True)
class PPT(PromptTuning):
    """L = CE(log Σ_c p_c(a_i) p_c(b_j), i) + [max p⁰ ≥ t]·CE(f_P(a_i), argmax p⁰) without labels; then f_P as `prompt_tuning`.
    a_i and b_i are two crops of image i, f_P the logits with the prompts P, p = softmax f_P, and p⁰ the same without prompts.

    In the first part of the run, P is trained on batches of `--unlabeled` images. Crop matching: among the second crops b_j of
    the batch, which one is of the same image as the first crop a_i? Its score is the probability that both have the same class,
    p = softmax f_P. Pseudo-labels: the class of a_i that the model predicts without P, p⁰, if its probability is at least t.
    In the second part P is tuned on labeled images, as `prompt_tuning` from its initial values. The saved file has P alone.

    Both tasks read the classes that the head predicts, so the head must classify before the run: that of a CLIP does, by the
    names of the classes; a new head of an image model does with `--lp-ft`.

    A step on unlabeled images has 3 forward passes, 2 of them without gradients. In a training loop of your own:
    `attachment.begin_pass(seed, step, number)` before each pass, the crop `method.unlabeled_view(number)` of the images,
    `attachment.unlabeled_passes`, `method.unlabeled_loss` and `attachment.after_step`.

    Args:
        tokens: p, number of trained vectors, at least 1.
        initialize: values before the pre-training: `uniform` is U(−limit, limit); `vocabulary`, `classes` and `auto` are those
            of `prompt_tuning`.
        words: initial words of the first vectors, one for each, separated by white space, instead of class names; the others are
            as `initialize`.
        limit: bound of `uniform`, above 0.
        pretraining_share: share of the optimizer steps for the pre-training on images without labels, above 0 and below 1.
        confidence: t, lowest probability p⁰ of a pseudo-label, 0 to 1; with lower ones, an image is only in the crop matching;
            above 1 no image has a pseudo-label.
    Counts: those of `prompt_tuning`, p·width; ViT-B/16 15,360 with p = 20, CLIP ViT-B/16 10,240.
    Source: Gu, Han, Liu, Huang, PPT: Pre-trained Prompt Tuning for Few-shot Learning, ACL 2022, section 3: prompts are
    pre-trained by tasks in the form of the later one and then tuned; a model labels the texts of single-sentence classification,
    of which those with confident labels are kept. Deviations: two crops of an image take the place of neighboring sentences, and
    the images of a batch that of candidate sentences; both tasks at once, in the same run and schedule as the tuning; the
    pseudo-labels are those of the task, by the frozen model; p = 20, in the paper 100.
    """

    name: ClassVar[str] = "ppt"
    uses: ClassVar[tuple[str, ...]] = ("few_labels", "smallest_file")
    paper: ClassVar[str] = "Gu, Han, Liu, Huang, PPT: Pre-trained Prompt Tuning for Few-shot Learning, ACL 2022"
    needs_unlabeled: ClassVar[bool] = True
    adapters: ClassVar[tuple[type[PromptTokens], type[TextPrompts]]] = (PPTTokens, PPTText)

    pretraining_share: float = 0.5
    confidence: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.pretraining_share < 1:
            raise OptionError.of(self.name, "pretraining_share", self.pretraining_share, "above 0, below 1")
        if not self.confidence >= 0:
            raise OptionError.of(self.name, "confidence", self.confidence, "at least 0")

    @classmethod
    def examples(cls) -> tuple[PPT, PPT]:
        """For text towers with short prompts."""
        return cls(tokens=4), cls(tokens=2, initialize="uniform", limit=0.1)

    def begin_pass(self, adapters: Iterable[tuple[Site, Any]], seed: int, step: int, number: int) -> None:
        """Leaves the prompts out in the last pass of a pre-training step."""
        for _, adapter in adapters:
            adapter.leaves_out = number == PASSES - 1 and bool(adapter.pretrains)

    def unlabeled_passes(self, adapters: Iterable[tuple[Site, Any]]) -> int:
        """3 during the pre-training, else 0."""
        return PASSES if any(bool(adapter.pretrains) for _, adapter in adapters) else 0

    def unlabeled_view(self, number: int) -> int:
        """The second crop in the second pass, else the first."""
        return 1 if number == 1 else 0

    def unlabeled_loss(self, outputs: Sequence[Tensor]) -> Tensor:
        """Crop matching and pseudo-labels of each image, (batch,)."""
        first, second = (logits.log_softmax(-1) for logits in outputs[:2])
        scores = (first.unsqueeze(1) + second.unsqueeze(0)).logsumexp(-1)
        matching = F.cross_entropy(scores, torch.arange(len(scores), device=scores.device), reduction="none")
        probability, label = outputs[2].softmax(-1).max(-1)
        pseudo = F.cross_entropy(outputs[0], label, reduction="none")
        return matching + pseudo * (probability >= self.confidence)

    def after_step(self, adapters: Iterable[tuple[Site, Any]], step: int, steps: int) -> None:
        """Ends the pre-training after `pretraining_share` of the steps."""
        for _, adapter in adapters:
            adapter.pretrains.fill_(step < self.schedule_end(steps) - 1)

    def schedule_end(self, steps: int) -> int:
        """The first step on labeled images."""
        return min(max(1, round(self.pretraining_share * steps)) + 1, steps)
