"""Consolidator beside its authors' grouped layers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from tests.parity.measure import Row, measure, perturb
from tests.parity.models import WIDTH, layer, tokens
from tests.parity.oracle import Repository

ORACLE = Repository("THU-MIG/Consolidator", "545d0066dd9601283744981596cca45f51290e07")
METHODS = ("consolidator",)


def rows() -> list[Row]:
    """The first linear layer of an MLP, with and without the shuffle of channels."""
    difference = max(_difference(shuffle) for shuffle in (False, True))
    return [Row("consolidator", "a linear layer, shuffle on and off: outputs, gradients", difference)]


def _difference(shuffle: bool) -> float:
    ours, linear = layer("consolidator", "mlp.fc1", channel_groups=4, shuffle=shuffle)
    names = ("REP_BRANCH_INIT_STD", "ChannelShuffle1d", "Consolidator")
    code = ORACLE.definitions("model/vision_transformer_timm.py", *names, OrderedDict=OrderedDict)
    theirs = code.Consolidator(WIDTH, 4 * WIDTH, with_channel_shuffle=shuffle, fc_groups=(4,)).double()
    perturb(theirs)
    theirs.fc_origin.load_state_dict({"weight": linear.weight[..., None], "bias": linear.bias})
    branch = theirs.fc_rep_branches[0].group_fc
    pairs: Any = [(ours.blocks, lambda read: read(branch.weight).squeeze(-1)), (ours.shift, lambda read: read(branch.bias))]
    x = tokens()
    return measure(lambda: ours.output(x, linear(x)), lambda: theirs(x), pairs)
