"""VPT: learned tokens beside the patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import TokenSite


class VPTAdapter(Adapter):
    """Inserts p tokens after the prefix tokens and takes them out where the site ends. Tokens: (B, N, width)."""

    def __init__(self, site: TokenSite, tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        self.prefix, self.dropout = site.prefix_tokens, dropout
        self.prompt = nn.Parameter(torch.empty(tokens, width))
        self.project = nn.Linear(width, site.width) if width != site.width else None

    def insert(self, tokens: Tensor) -> Tensor:
        """(B, N, width) to (B, N + p, width)."""
        prompt = self.prompt if self.project is None else self.project(self.prompt)
        prompt = F.dropout(prompt.expand(tokens.shape[0], -1, -1), self.dropout, self.training)
        head, rest = tokens[:, : self.prefix], tokens[:, self.prefix :]
        return torch.cat([head, prompt.to(tokens.dtype), rest], dim=1)

    def remove(self, tokens: Tensor) -> Tensor:
        """(B, N + p, width) to (B, N, width)."""
        return torch.cat([tokens[:, : self.prefix], tokens[:, self.prefix + len(self.prompt) :]], dim=1)


@dataclass(frozen=True)
class VPT(Method):
    """Deep: [x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}]); a fresh set of p prompts P before every block.

    Shallow (`where="tokens.tower"`): [x_1, Z_1, E_1] = L_1([x_0, P, E_0]), later blocks carry Z on. Prompts stand between the
    prefix tokens (class, registers) and the patches, after the position embedding, and are gone before pooling and head.

    Args:
        tokens: p, prompts per site.
        dropout: on the prompts, 0 to 1.
        project: width of the prompts before a linear projection to the model's width, one per site; 0 for none.
    Counts: p·width per block (deep), p·width in all (shallow), plus the projection.
    Source: Jia et al., Visual Prompt Tuning, ECCV 2022, equations 4 to 8. Start U(-v, v),
        v = sqrt(6 / (channels·patch² + width)). Deviation: the authors' code shares one projection between all blocks.
    """

    name: ClassVar[str] = "vpt"
    paper: ClassVar[str] = "Jia et al., Visual Prompt Tuning, ECCV 2022"
    needs: ClassVar[tuple[Need, ...]] = (Need(TokenSite, where={"can_insert": True}),)
    default: ClassVar[tuple[str, ...]] = ("tokens.block",)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-2

    tokens: int = 10
    dropout: float = 0.0
    project: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"vpt: tokens must be at least 1, got {self.tokens}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"vpt: dropout must be in [0, 1), got {self.dropout}")

    def build(self, site: TokenSite) -> VPTAdapter:
        """p prompts for one block or for the whole tower."""
        width = self.project or site.width
        adapter = VPTAdapter(site, self.tokens, width, self.dropout)
        height, depth, channels = site.patch
        bound = math.sqrt(6 / (channels * height * depth + width))
        nn.init.uniform_(adapter.prompt, -bound, bound)
        if adapter.project is not None:
            nn.init.kaiming_normal_(adapter.project.weight, mode="fan_out")
            nn.init.zeros_(adapter.project.bias)
        return adapter

    def count(self, site: TokenSite) -> int:
        """p·width, and the projection's weight and bias."""
        width = self.project or site.width
        return self.tokens * width + ((width + 1) * site.width if width != site.width else 0)
