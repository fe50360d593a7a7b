"""Cosine similarities of the prompts of two tasks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize


def average_similarity(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """cos(mean_i p_i, mean_j q_j) of the tokens p and q of two prompts; the mean over sites.

    Args:
        first, second: prompts (tokens, width) by site, of the same sites and widths.
    Source: Vu et al., SPoT, ACL 2022, section 4: "cosine similarity of average tokens". Deviation: with prompts at several
    layers the mean over layers.
    """
    return _mean([cosine_similarity(p.mean(0), second[site].mean(0), dim=0) for site, p in first.items()])


def token_similarity(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """mean_{i, j} cos(p_i, q_j) over all pairs of tokens of two prompts; the mean over sites.

    Args:
        first, second: as in `average_similarity`.
    Source: Vu et al., SPoT, ACL 2022, section 4: "per-token average cosine similarity", and Su et al., NAACL 2022.
    """
    return _mean([(normalize(p, dim=-1) @ normalize(second[site], dim=-1).T).mean() for site, p in first.items()])


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())
