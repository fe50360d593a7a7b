"""Null prompts: class names alone as the prompts of a CLIP, whose biases are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from veneer.injection.sites import ParamSite, PromptSite
from veneer.methods.selective.tensors.bitfit import BitFitAdapter

from ._fixed_prompts import FixedPromptAdapter, FixedPromptMethod


class NullPromptAdapter(FixedPromptAdapter):
    """Class weights (classes, features) from prompts [start] name [end]. `ids`: buffer (classes, length). No parameters."""

    def weights(self) -> Tensor:
        """The same for all images."""
        weights: Tensor = self.texts.encode(self.ids)
        return weights


@dataclass(frozen=True)
class NullPrompt(FixedPromptMethod):
    """Prompt of class k: [start] name_k [end], without a template; y = W x + (b + db) at every bias of both towers.

    The prompts replace the classifier's own templates. The deltas db are zero initially, so that a new adapter is the zero-shot
    classifier with the template `{}`. The names are encoded in each forward pass. `where` selects a tower:
    `prompts text/bias` trains the biases of the text tower alone. At strength s the class weights are W + s·(W' − W), as for
    `coop`, and the deltas are s·db. With other models than a CLIP classifier of named classes, use `bitfit`.

    Counts: the number of biases of both towers; CLIP ViT-B/16 171,008.
    Source: Logan et al., Cutting Down on Prompts and Parameters, Findings of ACL 2022, sections 3 and 5, and BitFit. Deviations:
    the input is an image, so that a null prompt is the name of the class alone, where the paper joins the input and the mask
    token; names are the label words, which the paper selects by hand or at random; deltas on frozen biases, as in `bitfit`; the
    logit scale is frozen.
    """

    name: ClassVar[str] = "null_prompt"
    uses: ClassVar[tuple[str, ...]] = ("few_labels", "smallest_file")
    paper: ClassVar[str] = "Logan et al., Cutting Down on Prompts and Parameters, Findings of ACL 2022"

    def build(self, site: PromptSite | ParamSite) -> NullPromptAdapter | BitFitAdapter:
        """The prompts of the names, or a zero delta of a bias.

        Raises:
            ValueError: a name is too long for the text tower.
        """
        if isinstance(site, PromptSite):
            with torch.device("cpu"):
                return NullPromptAdapter(site, site.tokenizer.ids(list(site.classes)))
        return BitFitAdapter(site.shape, site.channel_dim)

    def count(self, site: PromptSite | ParamSite) -> int:
        """Number of elements of the bias; 0 for the prompts."""
        return 0 if isinstance(site, PromptSite) else math.prod(site.shape)
