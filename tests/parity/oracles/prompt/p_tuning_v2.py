"""P-Tuning v2 and prefix tuning beside the prefix encoder of P-Tuning v2's authors."""

from __future__ import annotations

from typing import Any

import torch

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, WIDTH, link, links, perturb_trained, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("THUDM/P-tuning-v2", "b1520c9aa177ffe539a77b80fd8bca992e76513e", third_party=("prefix_tuning",))
METHODS = ("p_tuning_v2", "prefix_tuning")
TOKENS = 3


def rows() -> list[Row]:
    """Keys and values of all layers, from tables and from an MLP."""
    compared = "keys and values of all layers, gradients"
    return [
        Row("p_tuning_v2", compared, _difference("p_tuning_v2", 0)),
        Row("prefix_tuning", compared, _difference("prefix_tuning", 7)),
    ]


def _difference(method: str, hidden: int) -> float:
    config = {"pre_seq_len": TOKENS, "hidden_size": WIDTH, "prefix_hidden_size": hidden, "num_hidden_layers": DEPTH}
    code = ORACLE.definitions("model/prefix_encoder.py", "PrefixEncoder")
    theirs = code.PrefixEncoder(options(prefix_projection=bool(hidden), **config))
    perturb_trained(theirs)
    tuned = attach(vits()[0], method, tokens=TOKENS, hidden=hidden)
    adapters: Any = [adapter.eval() for _, adapter in tuned.parts.values()]
    pairs: Any = []
    for layer, ours in enumerate(adapters):
        rows_of = slice(2 * layer * WIDTH, 2 * (layer + 1) * WIDTH)
        if hidden:
            pairs += [
                (ours.out.weight, _rows(theirs.trans[2].weight, rows_of)),
                (ours.out.bias, _rows(theirs.trans[2].bias, rows_of)),
            ]
        else:
            pairs += [(table, _columns(theirs, 2 * layer + i)) for i, table in enumerate((ours.keys, ours.values))]
    if hidden:
        shared = adapters[0].shared
        pairs += [
            (shared.table, link(theirs.embedding.weight)),
            *links(shared.layer, theirs.trans[0], weight="weight", bias="bias"),
        ]

    def encode() -> Any:
        halves = [half.transpose(0, 1).flatten(1) for ours in adapters for half in ours.keys_values()]
        return torch.cat(halves, 1)

    return measure(encode, lambda: theirs(torch.arange(TOKENS)), pairs)


def _rows(tensor: Any, rows_of: slice) -> Any:
    return lambda read: read(tensor)[rows_of]


def _columns(theirs: Any, index: int) -> Any:
    return lambda read: read(theirs.embedding.weight)[:, index * WIDTH : (index + 1) * WIDTH]
