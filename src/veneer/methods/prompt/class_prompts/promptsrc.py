"""PromptSRC: independent prompts in both towers of a CLIP, regularized by the frozen model and averaged over the run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import normalize
from typing_extensions import Self

from veneer.injection.errors import OptionError
from veneer.injection.method import Method, Need
from veneer.injection.multimodal_prompt_site import MultimodalPromptSite
from veneer.injection.sites import Site
from veneer.injection.training_protocol import Distance

from ._deep_prompts import STD, DeepPromptAdapter, check_deep_options, check_words
from ._templates import TEMPLATES


class PassFeatures:
    """Normalized features of the passes of a batch; copies start empty.

    Attributes:
        frozen: True in the pass of the frozen model. `image`, `text`: of the prompts. `target`: of the frozen image tower.
    """

    def __init__(self) -> None:
        self.frozen = False
        self.clear()

    def __deepcopy__(self, memo: Any) -> PassFeatures:
        return PassFeatures()

    def clear(self) -> None:
        """Drops the features, and their graph."""
        self.image: Tensor | None = None
        self.text: Tensor | None = None
        self.target: Tensor | None = None


class PromptSRCAdapter(DeepPromptAdapter):
    """`images` (J, n, width of the image tower): the tokens of each block. `frozen_weights`: text features of the frozen model.

    `average_…` are weighted means of the parameters over `averages` points of the run.
    """

    frozen_weights: Tensor | None
    template_ids: Tensor
    averages: Tensor

    def __init__(self, site: MultimodalPromptSite, method: PromptSRC) -> None:
        depth = min(method.depth, len(site.images))
        super().__init__(site, method.tokens, method.words, min(method.depth, site.layers), method.image_tokens, depth)
        self.images = nn.Parameter(nn.init.normal_(torch.empty(depth, method.image_tokens, site.images[0].width), std=STD))
        templates = method.templates or TEMPLATES
        with torch.device("cpu"):
            texts = [template.replace("{}", name) for name in site.classes for template in templates]
            template_ids = site.tokenizer.ids(texts).unflatten(0, (len(site.classes), -1))
        self.register_buffer("template_ids", template_ids, persistent=False)
        self.register_buffer("frozen_weights", None, persistent=False)
        self.register_buffer("averages", torch.zeros(()), persistent=False)
        names = [name for name, _ in self.named_parameters()]
        for name in names:
            self.register_buffer(f"average_{name}", torch.zeros_like(getattr(self, name)), persistent=False)
        self.__dict__["training_buffers"] = ("averages", *(f"average_{name}" for name in names))
        self.passes = PassFeatures()

    @property
    def is_frozen(self) -> bool:
        """True in the training pass of the frozen model."""
        return self.passes.frozen and self.training and torch.is_grad_enabled()

    def image_prompt(self, index: int) -> Tensor:
        """The tokens of a block."""
        return self.images[index]

    def append(self, index: int, tokens: Tensor) -> Tensor:
        """The sequence with the tokens of a block; unchanged in the pass of the frozen model."""
        return tokens if self.is_frozen else super().append(index, tokens)

    def remove(self, index: int, tokens: Tensor) -> Tensor:
        """The sequence without them."""
        return tokens if self.is_frozen else super().remove(index, tokens)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """The class weights of the prompts; those of the templates in the pass of the frozen model."""
        if self.is_frozen:
            self.passes.target = normalize(x.detach(), dim=-1)
            return self.weights_of_templates().to(y.dtype)
        weights = super().output(x, y)
        if self.training and torch.is_grad_enabled():
            self.passes.image, self.passes.text = normalize(x, dim=-1), normalize(weights, dim=-1)
        return weights

    @torch.no_grad()
    def weights_of_templates(self) -> Tensor:
        """Text features (classes, features) of the frozen model, normalized after the mean over the templates. Cached."""
        if self.frozen_weights is None:
            count, templates, _ = self.template_ids.shape
            features = self.texts.encode(self.template_ids.flatten(0, 1), norm=False)
            self.frozen_weights = normalize(features.unflatten(0, (count, templates)).mean(1), dim=-1)
        return self.frozen_weights

    @torch.no_grad()
    def add_to_average(self, share: float) -> None:
        """Moves the means by `share` of their distance to the present parameters."""
        for name, parameter in self.named_parameters():
            self.get_buffer(f"average_{name}").lerp_(parameter, share)
        self.averages += 1

    @torch.no_grad()
    def use_average(self) -> None:
        """Sets the parameters to their means, if there are any."""
        if self.averages > 0:
            for name, parameter in self.named_parameters():
                parameter.copy_(self.get_buffer(f"average_{name}"))


@dataclass(frozen=True)
class PromptSRC(Method):
    """L = CE(q, label) + a·mean |g − g₀| + b·mean |f − f₀| + c·KL(q₀ ‖ q) / classes; then P = Σ_e w_e P_e over the run.

    f, g and q are the image features, text features and class probabilities with prompts, f₀, g₀ and q₀ those of the frozen
    CLIP, whose g₀ is the mean over many templates. Each of the first J blocks of both towers has its own prompts, as in `maple`,
    but those of the image tower are independent parameters. P_e are the prompts after e of E equal parts of the run, and
    w_e ∝ exp(−(e − μ)² / 2σ²) with Σ w_e = 1: both early prompts and those of the last steps have small weights.

    Every batch has a second forward pass, of the frozen model. The text features g₀ are computed in the first step. In a training
    loop of your own: `attachment.begin_pass(seed, step, number)` before each of two passes, `consistency_loss` for the last
    term, `penalty` for the two before, `after_step` and `finalize` for the average. Strength and order of attaching: as `maple`.

    Args:
        tokens: prompts per block of the text tower, at least 1; at most the tokens of `words`, unless empty.
        image_tokens: prompts per block of the image tower, at least 1.
        words: words before the name, such as `a photo of a`; see `maple`.
        depth: J, blocks with own prompts, at least 1; at most the blocks of a tower.
        text_weight: a, weight of the distance of the text features g from those of the frozen CLIP, at least 0.
        image_weight: b, weight of the distance of the image features f, at least 0.
        logit_weight: c, weight of the distance of the class probabilities q, at least 0. Without any of the three there is no
            second pass.
        average_parts: E, number of equal parts of the run whose last prompts are averaged, at least 1; the authors' epochs.
        average_mean: mean of the Gaussian w over the parts e, in parts.
        average_std: standard deviation of w, in parts, above 0.
        templates: prompts of the frozen CLIP with `{}` for the name; the authors' 60 if empty.
    Counts: J·tokens·width + J·image_tokens·width', width' of the image tower; CLIP ViT-B/16 46,080.
    Source: Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, ICCV 2023, equations 3 to
    7, and the authors' code: prompts from N(0, 0.02²), the KL divided by batch and classes, the first image prompts added before
    the tower's first norm. Deviations: the code has a second, frozen copy of the image tower; here the classifier's own tower has
    a pass without prompts. The last term is for one label per image.
    """

    name: ClassVar[str] = "promptsrc"
    uses: ClassVar[tuple[str, ...]] = ("few_labels",)
    paper: ClassVar[str] = "Khattak et al., Self-regulating Prompts: Foundational Model Adaptation without Forgetting, ICCV 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(MultimodalPromptSite),)
    default: ClassVar[tuple[str, ...]] = ("prompts",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2.5e-3

    tokens: int = 4
    image_tokens: int = 4
    words: str = "a photo of a"
    depth: int = 9
    text_weight: float = 25.0
    image_weight: float = 10.0
    logit_weight: float = 1.0
    average_parts: int = 20
    average_mean: float = 15.0
    average_std: float = 1.0
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_deep_options(self.name, self.tokens, self.depth)
        for option in ("image_tokens", "average_parts"):
            if getattr(self, option) < 1:
                raise OptionError.of(self.name, option, getattr(self, option), "at least 1")
        for option in ("text_weight", "image_weight", "logit_weight"):
            if getattr(self, option) < 0:
                raise OptionError.of(self.name, option, getattr(self, option), "at least 0")
        if self.average_std <= 0:
            raise OptionError.of(self.name, "average_std", self.average_std, "above 0")
        if wrong := [template for template in self.templates if "{}" not in template]:
            raise OptionError.of(self.name, "templates", wrong[0], "a text with {}")

    @classmethod
    def examples(cls) -> tuple[PromptSRC, PromptSRC]:
        """For towers with few blocks."""
        return cls(depth=2, templates=("a {}.", "my {}")), cls(words="", tokens=3, image_tokens=2, depth=2, templates=("{}",))

    def build(self, site: MultimodalPromptSite) -> PromptSRCAdapter:
        """The prompts of both towers.

        Raises:
            ValueError: a prompt is too long for the text tower, or `words` has fewer than `tokens` tokens.
        """
        check_words(self.name, self.words, self.tokens, site)
        return PromptSRCAdapter(site, self)

    def count(self, site: MultimodalPromptSite) -> int:
        """J·tokens·width + J·image_tokens·width'."""
        text = min(self.depth, site.layers) * self.tokens * site.width
        return text + min(self.depth, len(site.images)) * self.image_tokens * site.images[0].width

    @property
    def passes(self) -> int:
        """2 with a regularization, else 1."""
        return 2 if self.text_weight or self.image_weight or self.logit_weight else 1

    def begin_pass(self, adapters: Iterable[tuple[Site, Any]], seed: int, step: int, number: int) -> None:
        """The second pass is that of the frozen model."""
        for _, adapter in adapters:
            adapter.passes.frozen = number == 1

    def consistency_loss(self, outputs: Sequence[Tensor], distance: Distance) -> Tensor:
        """c·KL(q₀ ‖ q) / classes, (batch,)."""
        student, target = (logits.log_softmax(-1) for logits in (outputs[0], outputs[1].detach()))
        return self.logit_weight * F.kl_div(student, target, reduction="none", log_target=True).mean(-1)

    def penalty(self, adapters: Iterable[tuple[Site, Any]]) -> Tensor | None:
        """a·mean |g − g₀| + b·mean |f − f₀| of the two last passes, or None without them."""
        total = None
        for _, adapter in adapters:
            seen = adapter.passes
            if seen.image is not None and seen.target is not None and seen.text is not None:
                text = F.l1_loss(seen.text, adapter.weights_of_templates().to(seen.text.dtype))
                term = self.text_weight * text + self.image_weight * F.l1_loss(seen.image, seen.target)
                total = term if total is None else total + term
            seen.clear()
            seen.frozen = False
        return total

    def shares(self, step: int, steps: int) -> list[float]:
        """For each part of the run that ends at `step`: its share of the weights up to it, w_e / (w_1 + … + w_e)."""
        before, now = ((s * self.average_parts) // steps for s in (step - 1, step))
        logs = [-(((e - self.average_mean) / self.average_std) ** 2) / 2 for e in range(1, now + 1)]
        return [1 / sum(math.exp(min(log - logs[e], 700)) for log in logs[: e + 1]) for e in range(before, now)]

    def after_step(self, adapters: Iterable[tuple[Site, Any]], step: int, steps: int) -> None:
        """Adds the prompts to the average at the end of each part of the run."""
        parts = list(adapters)
        for share in self.shares(step, steps):
            for _, adapter in parts:
                adapter.add_to_average(share)

    def schedule_end(self, steps: int) -> int:
        """The last step, with which the average is complete."""
        return steps

    def finalize(self, adapters: Iterable[tuple[Site, Any]]) -> Self:
        """Sets the prompts to their average."""
        for _, adapter in adapters:
            adapter.use_average()
        return self
