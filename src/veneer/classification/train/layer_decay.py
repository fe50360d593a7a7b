"""Layer-wise learning-rate decay: early blocks of a pretrained model are trained with lower learning rates than late ones.

    learning rate of a parameter of layer d = peak · decay^(D − d)

D is the number of blocks of the parameter's tower. Layers: 0 to D − 1 for the blocks in order, −1 for what comes before them
(patch embedding, stem, positions, prompts), and D for what comes after them (last norm, pooling, head). Layers between two
blocks, such as the downsampling of a stage, belong to the block that follows. Parameters of no tower with
blocks, such as a scale of logits, come after them. An adapter has the layer of its site.

Source: Clark et al., ELECTRA, ICLR 2020; Bao et al., BEiT, ICLR 2022, and its code, which MAE shares; for other architectures
timm's `param_groups_layer_decay`. Deviations from timm: the last norm of a ViT and the last convolution of an EfficientNet
with its norm have the rate of the head, as in BEiT and MAE; in timm they have that of the last block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from veneer.injection import Attachment
from veneer.injection.errors import OptionError
from veneer.injection.sites import PixelSite, PromptSite, Site, TokenSite
from veneer.training.block_learning_rates import parameters_by_site, shared_factor, sites_of, split_groups
from veneer.training.loop.optimizers import ParameterGroup

INPUTS = (PixelSite, PromptSite, TokenSite)
"""Sites at the input of a tower, if they are outside its blocks."""


def with_layer_decay(groups: Sequence[ParameterGroup], attached: Sequence[Attachment], decay: float) -> list[ParameterGroup]:
    """The parameter groups, split so that `lr_scale` is multiplied by decay^(D − d) of each parameter.

    Raises:
        OptionError: no trained parameter belongs to a block.
        SelectionError: sites of different layers share a parameter.
    """
    return list(groups) if decay == 1 else split_groups(groups, layer_factors(attached, decay))


def layer_factors(attached: Sequence[Attachment], decay: float) -> dict[int, float]:
    """decay^(D − d) of each trained parameter, by its id. Raises the errors of `with_layer_decay`."""
    owners: dict[int, dict[str, float]] = {}
    in_blocks = False
    for attachment in attached:
        sites, _ = sites_of(attachment)
        layers = layers_of(list(sites.values()))
        blocks = block_counts(list(sites.values()))
        for name, parameter in parameters_by_site(attachment, sites):
            in_blocks = in_blocks or sites[name].depth is not None
            owners.setdefault(id(parameter), {})[name] = decay ** (blocks[sites[name].tower] - layers[name])
    if not in_blocks:
        names = ", ".join(attachment.method.name for attachment in attached) or "nothing"
        message = f"layer_decay is {decay}, but {names} trains no parameter of a block. Leave out --layer-decay."
        raise OptionError(message, option="layer_decay", given=decay, expected=1.0)
    return {key: shared_factor(by_site, "layer_decay") for key, by_site in owners.items()}


def layers_of(sites: Sequence[Site]) -> Mapping[str, int]:
    """Layer of each site by name, -1 to the number of blocks of its tower.

    Args:
        sites: of whole towers, in the order of the forward pass, in which hosts list them.
    """
    layers: dict[str, int] = {}
    for tower, blocks in block_counts(sites).items():
        within = [site for site in sites if site.tower == tower]
        first = next((place for place, site in enumerate(within) if site.depth is not None), 0)
        following = blocks
        for place, site in reversed(list(enumerate(within))):
            following = following if site.depth is None else site.depth
            is_input = site.depth is None and (place < first or isinstance(site, INPUTS))
            layers[site.name] = -1 if is_input else following
    return layers


def block_counts(sites: Sequence[Site]) -> dict[str, int]:
    """Number of blocks of each tower."""
    counts = dict.fromkeys((site.tower for site in sites), 0)
    for site in sites:
        if site.depth is not None:
            counts[site.tower] = max(counts[site.tower], site.depth + 1)
    return counts
