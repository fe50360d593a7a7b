"""Selection of the adapters whose domains are most similar to new images, by features of a frozen encoder (AdapterSoup)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from veneer.extras import require
from veneer.injection.errors import OptionError

Selection = Literal["clusters", "similarity"]
DIMENSIONS = 50
"""Principal components of the features that are clustered."""


def select_adapters(
    domains: Sequence[Tensor], images: Tensor, by: Selection = "clusters", *, most: int = 5, share: float = 0.1, seed: int = 0
) -> tuple[float, ...]:
    """Weights for `average_files`: equal ones of the selected adapters, with sum 1, and 0 for the others.

    Args:
        domains: for each adapter, features (n, d) of images that it was trained on, 100 are enough. `images`: features (m, d) of
            the new domain.
        by: `clusters`: a Gaussian mixture with one component for each domain is fitted to the features of all domains, without
            labels; a cluster belongs to the domain with most images in it; the domains whose clusters get at least `share` of the
            new images are selected. `similarity`: the domains whose mean feature has the highest cosine similarity with that of
            the new images.
        most: of `similarity`, number of adapters; of `clusters`, the largest number; at least 1.
        share: of `clusters`, smallest share of the new images, 0 to 1; if none has it, the domain with most images is selected.
        seed: of the mixture.
    Raises:
        OptionError: an option is out of range, or features differ in width.
    Source: Chronopoulou et al., AdapterSoup: Weight Averaging to Improve Generalization of Pretrained Language Models, Findings
    of EACL 2023: clustering and similarity of text. Deviations: features of images in place of sentences; diagonal covariances,
    after projection to 50 principal components.
    """
    if by not in get_args(Selection):
        raise OptionError.of("select_adapters", "by", by, "clusters or similarity")
    if most < 1:
        raise OptionError.of("select_adapters", "most", most, "at least 1")
    if not 0 <= share <= 1:
        raise OptionError.of("select_adapters", "share", share, "in [0, 1]")
    widths = [each.shape[-1] if each.ndim == 2 and len(each) else 0 for each in (*domains, images)]
    if not domains or len(set(widths)) > 1 or not widths[0]:
        raise OptionError.of("select_adapters", "domains", widths, "features (n, d) of one width, at least one of each domain")
    scores = _similarities(domains, images) if by == "similarity" else _cluster_shares(domains, images, seed)
    order = sorted(range(len(domains)), key=lambda i: -scores[i])[:most]
    chosen = order if by == "similarity" else [i for i in order if scores[i] >= share and scores[i]] or order[:1]
    return tuple(1 / len(chosen) if i in chosen else 0.0 for i in range(len(domains)))


def _similarities(domains: Sequence[Tensor], images: Tensor) -> list[float]:
    """Cosine similarity of the mean normalized features."""
    means = [torch.nn.functional.normalize(each.double(), dim=1).mean(0) for each in (*domains, images)]
    return [float(torch.nn.functional.cosine_similarity(mean, means[-1], dim=0)) for mean in means[:-1]]


def _cluster_shares(domains: Sequence[Tensor], images: Tensor, seed: int) -> list[float]:
    """Share of the new images in the clusters of each domain."""
    require("sklearn")
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    features = torch.cat([each.double() for each in domains]).cpu().numpy()
    labels = torch.cat([torch.full((len(each),), i) for i, each in enumerate(domains)])
    projection = PCA(min(DIMENSIONS, *features.shape), random_state=seed).fit(features)
    mixture = GaussianMixture(len(domains), covariance_type="diag", random_state=seed).fit(projection.transform(features))
    old, new = (torch.as_tensor(mixture.predict(projection.transform(f))) for f in (features, images.double().cpu().numpy()))
    shares = [0.0] * len(domains)
    for cluster in range(len(domains)):
        counts = torch.bincount(labels[old == cluster], minlength=len(domains))
        shares[int(counts.argmax())] += float((new == cluster).double().mean())
    return shares
