"""VPT: learned prompt tokens beside the patches."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.errors import OptionError
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import TokenSite

OLD_PROJECT = (
    "vpt with project of revision 1 had a projection for each block; since revision 2 all blocks share one, as in the authors' "
    "code. Train it again, or load it with the veneer version that wrote it."
)


class Projections(nn.ModuleDict):
    """The linear projection of all prompts, `project` to the model's width; one for each width among the sites."""

    def __init__(self, project: int, widths: Sequence[int]) -> None:
        layers = {str(width): nn.Linear(project, width) for width in sorted(set(widths))}
        super().__init__(layers)
        for layer in layers.values():  # the bias keeps torch's initialization
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")


class VPTAdapter(Adapter):
    """Inserts p tokens after the prefix tokens and removes them at the end of the site. Tokens: (B, N, width)."""

    shared: Projections

    def __init__(self, site: TokenSite, tokens: int, project: int, dropout: float) -> None:
        super().__init__()
        self.prefix, self.dropout, self.width, self.projected = site.prefix_tokens, dropout, site.width, project > 0
        self.prompt = nn.Parameter(torch.empty(tokens, project or site.width))

    @property
    def project(self) -> nn.Module | None:
        """The shared projection, or None."""
        return self.shared[str(self.width)] if self.projected else None

    def insert(self, tokens: Tensor) -> Tensor:
        """(B, N, width) to (B, N + p, width)."""
        project = self.project
        prompt = self.prompt if project is None else project(self.prompt)
        prompt = F.dropout(prompt.expand(tokens.shape[0], -1, -1), self.dropout, self.training)
        head, rest = tokens[:, : self.prefix], tokens[:, self.prefix :]
        return torch.cat([head, prompt.to(tokens.dtype), rest], dim=1)

    def remove(self, tokens: Tensor) -> Tensor:
        """(B, N + p, width) to (B, N, width)."""
        return torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix + len(self.prompt) :]], dim=1)


@dataclass(frozen=True)
class VPT(Method):
    """Deep: [x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}]); a separate set of p prompts P before every block.

    Shallow (`where="tokens.tower"`): [x_1, Z_1, E_1] = L_1([x_0, P, E_0]), later blocks pass Z on. Prompts are inserted between
    the prefix tokens (class, registers) and the patches, after the position embedding, and are removed before pooling and head.

    Args:
        tokens: p, prompts per site.
        dropout: dropout probability of the prompts, 0 to 1.
        project: width of the prompts before a linear projection to the model's width, which all sites share; 0 for none.
    Counts: p·width per block (deep), p·width in all (shallow); with a projection p·project, and (project + 1)·width once.
    ViT-B/16, deep, p = 10: 92,160; with project 64 57,600.
    Saved files: files of revision 1 with a projection for each block are rejected.
    Source: Jia et al., Visual Prompt Tuning, ECCV 2022, equations 4 to 8, and its code. Initial prompts U(-v, v),
        v = sqrt(6 / (channels·patch² + width)); projection: weight N(0, 2 / width), bias as torch's Linear.
    Deviation: on hosts with mean pooling (MAE, `global_pool="avg"`) the mean is over the patches, the `img_pool` of the authors'
    code; its default, `VIT_POOL_TYPE = "original"`, also averages the last block's prompts.
    """

    name: ClassVar[str] = "vpt"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    recommended_for: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = "Jia et al., Visual Prompt Tuning, ECCV 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(TokenSite, where={"can_insert": True}),)
    default: ClassVar[tuple[str, ...]] = ("tokens.block",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2
    revision: ClassVar[int] = 2
    shared_options: ClassVar[tuple[str, ...]] = ("project",)

    tokens: int = 10
    dropout: float = 0.0
    project: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise OptionError.of("vpt", "tokens", self.tokens, "at least 1")
        if not 0 <= self.dropout < 1:
            raise OptionError.of("vpt", "dropout", self.dropout, "in [0, 1)")
        if self.project < 0:
            raise OptionError.of("vpt", "project", self.project, "at least 0")

    def build_shared(self, sites: Sequence[TokenSite]) -> Projections | None:
        """The projection, if enabled."""
        return Projections(self.project, [site.width for site in sites]) if self.project else None

    def build(self, site: TokenSite) -> VPTAdapter:
        """p prompts for one block or for the whole tower."""
        adapter = VPTAdapter(site, self.tokens, self.project, self.dropout)
        height, depth, channels = site.patch
        bound = math.sqrt(6 / (channels * height * depth + adapter.prompt.shape[1]))
        nn.init.uniform_(adapter.prompt, -bound, bound)
        return adapter

    def count(self, site: TokenSite) -> int:
        """p·width, or p·project."""
        return self.tokens * (self.project or site.width)

    @classmethod
    def migrate(cls, config: Mapping[str, Any], revision: int, tensors: Collection[str]) -> dict[str, Any]:
        """The options unchanged; in revision 1, `project` equal to the model's width meant no projection.

        Raises:
            ValueError: a file of revision 1 with a projection for each block.
        """
        if revision > 1 or not config.get("project"):
            return dict(config)
        if any(":project." in name for name in tensors):
            raise OptionError(OLD_PROJECT, option="project", method=cls.name, given=revision, expected=cls.revision)
        return {**config, "project": 0}
