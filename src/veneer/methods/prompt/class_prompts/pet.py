"""PET: a CLIP for each prompt pattern, trained on few labels, whose mean is distilled into one by images without labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import normalize
from typing_extensions import Self

from veneer.injection.attachment.deferred_init import zeros
from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter
from veneer.injection.sites import ParamSite, PromptSite, Site

from . import _generations
from ._fixed_prompts import FixedPromptAdapter, FixedPromptMethod

PATTERNS = ("{}", "a photo of a {}.", "an image of {}.", "this is {}.")


class PETBiasAdapter(Adapter):
    """b' = b + d_i, i the model that is trained; in evaluation the distilled one, which is the last. `deltas`: (models, *shape).

    Attributes:
        index: of the model in the current training pass, −1 for the distilled one.
    """

    adds: ClassVar[bool] = True
    applies_strength: ClassVar[bool] = True

    def __init__(self, site: ParamSite, models: int) -> None:
        super().__init__()
        self.deltas = nn.Parameter(zeros(models, *site.shape))
        self.channel_dim, self.index = site.channel_dim, -1

    @property
    def delta(self) -> Tensor:
        """d_i·strength."""
        return self.deltas[self.index if self.training else -1] * self.strength

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """y + d_i along the channel dimension."""
        shape = [1] * y.ndim
        shape[self.channel_dim] = -1
        return y + self.delta.view(shape)

    def weight(self, weight: Tensor) -> Tensor:
        """b + d_i."""
        return weight + self.delta


class PETPromptAdapter(FixedPromptAdapter):
    """Class weights of one pattern, or of the distilled model: the mean over all patterns. No parameters.

    Attributes:
        ids: buffer (patterns, prompts, length). `words`: buffer (classes, prompts), 1 for the prompts of a class.
        distills: buffer (), 1 when the models of the patterns are trained and the last one is distilled from them.
        index: as in `PETBiasAdapter`.
    """

    words: Tensor
    distills: Tensor
    training_buffers: ClassVar[tuple[str, ...]] = ("distills",)

    def __init__(self, site: PromptSite, patterns: Sequence[str], words: Sequence[Sequence[str]]) -> None:
        texts = [pattern.replace("{}", word) for pattern in patterns for several in words for word in several]
        super().__init__(site, site.tokenizer.ids(texts).unflatten(0, (len(patterns), -1)))
        classes = torch.tensor([label for label, several in enumerate(words) for _ in several])
        self.register_buffer("words", F.one_hot(classes, len(words)).T.float(), persistent=False)
        self.register_buffer("distills", torch.zeros(()), persistent=False)
        self.index = -1

    def weights(self) -> Tensor:
        """(classes, features): the normalized mean over the label words of a class, and over patterns if there are several."""
        ids = self.ids[self.index : self.index + 1] if self.training and self.index >= 0 else self.ids
        features = self.texts.encode(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        return normalize(self.words.to(features.dtype) @ features, dim=-1).mean(0)


@dataclass(frozen=True)
class PET(FixedPromptMethod):
    """L_i = CE(f_i(x), label) for each pattern i; then L = T²·KL(softmax(mean_i f_i(x) / T) ‖ softmax(f(x) / T)) without labels.

    Each of P patterns, prompts with `{}` for a label word, has a model f_i: biases of both towers with their own deltas, as
    in `bitfit`, zero initially. In the first part of the run step t trains model t mod P on a batch with labels. In the second
    part their mean labels batches of `--unlabeled` images, on which the distilled model f is trained: the mean over the class
    weights of all patterns, with further deltas. The saved file has f alone, with one forward pass as any classifier. A label
    word is the name of its class, if there are no others; the features of several words of a class are averaged.

    With G generations (iPET) the first part has G equal parts, and the models start from zero deltas in each. Before generation
    g > 0 they label the images of `--unlabeled`: model i gets those that a random subset of the others has labeled, d^g times as
    many images as there are labeled ones, with the same share of each class, and trains on both. The last generation is
    distilled.

    A step on unlabeled images has P + 1 forward passes, P of them without gradients. In a training loop of your own:
    `attachment.begin_pass(seed, step, number)` before each pass, `method.unlabeled_passes` and `unlabeled_loss` for the second
    part, `after_step` and `finalize`. Other methods beside it are shared by all models. Strength as for `null_prompt`.

    Args:
        patterns: P ≥ 1 texts with `{}` for the label word.
        label_words: class name to its label words, separated by `|`: `dog=puppy|hound`; the name itself if it has none.
        labeled_share: share of the steps that train the models of the patterns, 0 to 1, both excluded.
        temperature: T, above 0.
        generations: G ≥ 1; 1 is PET, 3 the default of the authors' iPET. Several need at least two patterns, and G·P steps with
            labels.
        growth: d, above 1: the factor by which the images of a generation grow.
        annotators: share of the other models, at least one, that label the images of a model, above 0, at most 1.
        distilled: only the distilled model, as in a saved file.
    Counts: (P + 1)·biases of both towers, the file 1·biases; CLIP ViT-B/16 with 4 patterns 855,040, the file 171,008.
    Source: Schick and Schütze, Exploiting Cloze Questions for Few Shot Text Classification, EACL 2021, section 3, and the
    authors' code: T = 2, the mean of the logits, d = 5, a quarter of the models. Deviations: deltas of biases instead of all
    weights; one model for each pattern instead of three; uniform weights of the patterns; no auxiliary language model loss; the
    distilled model has the prompts of all patterns instead of a new head; patterns, generations and distillation share a run,
    its schedule and the moments of its optimizer.
    """

    name: ClassVar[str] = "pet"
    uses: ClassVar[tuple[str, ...]] = ("few_labels",)
    paper: ClassVar[str] = "Schick, Schütze, Exploiting Cloze Questions for Few Shot Text Classification, EACL 2021"
    needs_unlabeled: ClassVar[bool] = True

    patterns: tuple[str, ...] = PATTERNS
    label_words: Mapping[str, str] = field(default_factory=dict, hash=False)
    labeled_share: float = 0.5
    temperature: float = 2.0
    generations: int = 1
    growth: float = 5.0
    annotators: float = 0.25
    distilled: bool = False

    def __post_init__(self) -> None:
        wrong = [pattern for pattern in self.patterns if "{}" not in pattern]
        if wrong or not self.patterns:
            raise OptionError.of(self.name, "patterns", wrong[0] if wrong else (), "at least one text with {} in each")
        if not 0 < self.labeled_share < 1:
            raise OptionError.of(self.name, "labeled_share", self.labeled_share, "above 0, below 1")
        if not 0 < self.temperature < math.inf:
            raise OptionError.of(self.name, "temperature", self.temperature, "finite and above 0")
        if self.generations < 1 or (self.generations > 1 and len(self.patterns) < 2):
            expected = "1, or more with at least two patterns"
            raise OptionError.of(self.name, "generations", self.generations, expected)
        if not 1 < self.growth < math.inf:
            raise OptionError.of(self.name, "growth", self.growth, "finite and above 1")
        if not 0 < self.annotators <= 1:
            raise OptionError.of(self.name, "annotators", self.annotators, "above 0, at most 1")
        if empty := [name for name, words in self.label_words.items() if not all(map(str.strip, words.split("|")))]:
            raise OptionError.of(self.name, "label_words", {empty[0]: self.label_words[empty[0]]}, "words separated by |")

    @classmethod
    def examples(cls) -> tuple[PET, PET]:
        """For text towers with short prompts."""
        return cls(patterns=("{}", "a {}.")), cls(patterns=("my {}",), temperature=1.0)

    @property
    def models(self) -> int:
        """P + 1, or 1 after the distillation."""
        return 1 if self.distilled else len(self.patterns) + 1

    def words_of(self, names: Sequence[str]) -> list[list[str]]:
        """The label words of each class.

        Raises:
            OptionError: label words of a class that does not exist.
        """
        table = {name.replace("_", " "): words for name, words in self.label_words.items()}
        if unknown := sorted(table.keys() - set(names)):
            raise OptionError.of(self.name, "label_words", unknown[0], f"the name of a class: {', '.join(names)}")
        return [[word.strip() for word in table.get(name, name).split("|")] for name in names]

    def build(self, site: PromptSite | ParamSite) -> PETPromptAdapter | PETBiasAdapter:
        """The prompts of all patterns, or zero deltas of a bias.

        Raises:
            ValueError: a prompt is too long for the text tower, or label words of an unknown class.
        """
        if isinstance(site, PromptSite):
            with torch.device("cpu"):
                return PETPromptAdapter(site, self.patterns, self.words_of(site.classes))
        return PETBiasAdapter(site, self.models)

    def count(self, site: PromptSite | ParamSite) -> int:
        """(P + 1)·elements of the bias; 0 for the prompts."""
        return 0 if isinstance(site, PromptSite) else self.models * math.prod(site.shape)

    def begin_pass(self, adapters: Iterable[tuple[Site, Any]], seed: int, step: int, number: int) -> None:
        """Selects the model of the pass: that of pattern `step` mod P; in distillation first the distilled one, then those."""
        parts = [adapter for _, adapter in adapters]
        index = number - 1 if self._distills(parts) else step % len(self.patterns)
        for adapter in parts:
            adapter.index = -1 if self.distilled else index

    def unlabeled_passes(self, adapters: Iterable[tuple[Site, Any]]) -> int:
        """P + 1 in distillation, else 0."""
        return self.models if self._distills([adapter for _, adapter in adapters]) else 0

    def unlabeled_loss(self, outputs: Sequence[Tensor]) -> Tensor:
        """T²·KL of the mean logits of the patterns and those of the distilled model, (batch,)."""
        target = (torch.stack([*outputs[1:]]).mean(0) / self.temperature).log_softmax(-1)
        student = (outputs[0] / self.temperature).log_softmax(-1)
        return self.temperature**2 * F.kl_div(student, target, reduction="none", log_target=True).sum(-1)

    def after_step(self, adapters: Iterable[tuple[Site, Any]], step: int, steps: int) -> None:
        """Begins the distillation after `labeled_share` of the steps."""
        for _, adapter in adapters:
            if isinstance(adapter, PETPromptAdapter):
                adapter.distills.fill_(step >= self.schedule_end(steps) - 1)

    def schedule_end(self, steps: int) -> int:
        """The first step of the distillation."""
        return min(max(1, round(self.labeled_share * steps)) + 1, steps)

    @property
    def models_in_turn(self) -> int:
        """P."""
        return len(self.patterns)

    def generation_starts(self, steps: int) -> tuple[int, ...]:
        """First steps of the generations after the first one.

        Raises:
            OptionError: fewer than G·P steps with labels, so that a generation has a model without a step.
        """
        labeled, needed = self.schedule_end(steps) - 1, self.generations * len(self.patterns)
        if self.generations > 1 and labeled < needed:
            message = f"{self.name}: {labeled} of {steps} steps have labels; {self.generations} generations need {needed}."
            raise OptionError(message, option="generations", method=self.name, given=labeled, expected=needed)
        return tuple(generation * labeled // self.generations for generation in range(1, self.generations))

    def training_sets(
        self, logits: Tensor, counts: Sequence[int], generation: int, generator: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """Images labeled by a random subset of the other models; see `_generations.training_sets`."""
        return _generations.training_sets(logits, counts, generation, self.growth, self.annotators, generator)

    @torch.no_grad()
    def begin_generation(self, adapters: Iterable[tuple[Site, Any]]) -> None:
        """Zero deltas of the patterns."""
        for _, adapter in adapters:
            if isinstance(adapter, PETBiasAdapter) and not self.distilled:
                adapter.deltas[: len(self.patterns)] = 0

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Drops the deltas of the patterns."""
        for _, adapter in adapters:
            if isinstance(adapter, PETBiasAdapter) and len(adapter.deltas) > 1:
                adapter.deltas = nn.Parameter(adapter.deltas.detach()[-1:].clone())
            adapter.index = -1
        return dataclasses.replace(self, distilled=True)

    def _distills(self, parts: Sequence[Any]) -> bool:
        return not self.distilled and any(isinstance(each, PETPromptAdapter) and bool(each.distills) for each in parts)
