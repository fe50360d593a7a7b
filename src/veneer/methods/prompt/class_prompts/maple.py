"""MaPLe: learned context vectors of CLIP prompts, projected to prompts of the image tower."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from veneer.injection.method import Method, Need
from veneer.injection.multimodal_prompt_site import MultimodalPromptSite

from ._deep_prompts import DeepPromptAdapter, check_deep_options, check_words


class MaPLeAdapter(DeepPromptAdapter):
    """Tokens F_i(P_i) before block i of the image tower, F_i linear, P_i the prompts of block i of the text tower."""

    def __init__(self, site: MultimodalPromptSite, tokens: int, words: str, depth: int) -> None:
        super().__init__(site, tokens, words, depth, tokens, depth)
        first, later = (nn.Linear(site.width, site.images[0].width) for _ in range(2))
        self.project = nn.ModuleList([first, *(copy.deepcopy(later) for _ in range(depth - 1))])

    def image_prompt(self, index: int) -> Tensor:
        """F_i(P_i): (M, width of the image tower)."""
        prompt = self.context if index == 0 or self.deep is None else self.deep[index - 1]
        projected: Tensor = self.project[index](prompt)
        return projected


@dataclass(frozen=True)
class MaPLe(Method):
    """Text: [start, P_i, W_i] = L_i([start, P_(i−1), W_(i−1)]); image: [c_i, E_i, _] = V_i([c, E, F_(i−1)(P_(i−1))]), i ≤ J.

    Each of the first J blocks of both towers has its own M prompts: those of the text tower are trained, and a linear map F
    projects them to those of the image tower. The outputs of the prompts of block J pass through the later blocks. In the text
    tower the prompts follow the start token: the first tokens of `words` are the initial P_0, and the other words stay in the
    prompt, before the name of the class and a full stop. In the image tower they follow the patches.

    The prompts replace the classifier's own templates. Tokens cannot be blended, so the strength is 0 or 1. Several attachments
    on one model must be attached in ascending order of depth.

    Args:
        tokens: M, prompts per block, at least 1; at most the tokens of `words`, unless empty.
        words: words before the name, such as `a photo of a`. Empty: P_0 has the initial values of the other prompts.
        depth: J, blocks with own prompts, at least 1; at most the blocks of either tower, to which larger values are reduced.
    Counts: J·M·width + J·(width + 1)·width', width' of the image tower; CLIP ViT-B/16 3,555,072.
    Source: Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023, equations 4 to 10, and the authors' code: P_i from
    N(0, 0.02²), F_0 and the others as torch's linear layers, F_1 … F_(J−1) equal at the start, the first image prompts added
    before the tower's first norm. Deviation: the code ignores `words` if M is above 4, here M may be as large as their number.
    """

    name: ClassVar[str] = "maple"
    uses: ClassVar[tuple[str, ...]] = ("few_labels",)
    paper: ClassVar[str] = "Khattak et al., MaPLe: Multi-modal Prompt Learning, CVPR 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(MultimodalPromptSite),)
    default: ClassVar[tuple[str, ...]] = ("prompts",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 3.5e-3

    tokens: int = 2
    words: str = "a photo of a"
    depth: int = 9

    def __post_init__(self) -> None:
        check_deep_options(self.name, self.tokens, self.depth)

    @classmethod
    def examples(cls) -> tuple[MaPLe, MaPLe]:
        """For towers with few blocks."""
        return cls(depth=2), cls(words="", tokens=3, depth=2)

    def _depth(self, site: MultimodalPromptSite) -> int:
        return min(self.depth, site.layers, len(site.images))

    def build(self, site: MultimodalPromptSite) -> MaPLeAdapter:
        """The prompts of the text tower and their projections.

        Raises:
            ValueError: a prompt is too long for the text tower, or `words` has fewer than M tokens.
        """
        check_words(self.name, self.words, self.tokens, site)
        return MaPLeAdapter(site, self.tokens, self.words, self._depth(site))

    def count(self, site: MultimodalPromptSite) -> int:
        """J·M·width + J·(width + 1)·width'."""
        return self._depth(site) * (self.tokens * site.width + (site.width + 1) * site.images[0].width)
