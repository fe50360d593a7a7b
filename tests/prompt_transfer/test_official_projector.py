"""The projector beside its authors' two versions, if a clone of their repository is here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.parity.measure import measure, randn
from tests.parity.models import link
from tests.parity.oracle import OracleMissing, Repository, options
from veneer.prompt_transfer import PromptProjector

ORACLE = Repository("thunlp/Prompt-Transferability", "2d15de5f7adfa25b2b1a8c49894f6d19cf3ac9ee")
TOKENS, SOURCE, TARGET, BATCH = 4, 6, 5, 2


class SoftTemplate(nn.Module):
    """The base class of OpenPrompt, as far as the projector uses it: a prompt and the embedding of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = TOKENS
        self.soft_embeds = nn.Parameter(randn(TOKENS, SOURCE))
        self.raw_embedding = lambda ids: ids


def definitions(path: str, *names: str, **namespace: Any) -> Any:
    try:
        return ORACLE.definitions(path, *names, **namespace)
    except OracleMissing as missing:
        pytest.skip(str(missing))


def links(ours: PromptProjector, first: nn.Linear, second: nn.Linear) -> Any:
    pairs = ((ours.first, first), (ours.second, second))
    return [(getattr(a, name), link(getattr(b, name))) for a, b in pairs for name in ("weight", "bias")]


def test_all_tokens_together() -> None:
    """`CrossModelProjector`, whose prompt stands before the embeddings of a batch."""
    code = definitions(
        "Prompt-Transferability-2.0-latest/prompt_hub/cross_model.py", "CrossModelProjector", SoftTemplate=SoftTemplate,
        Union=dict, Dict=dict, InputFeatures=dict,
    )  # fmt: skip
    args = options(prompt_len=TOKENS)
    theirs = code.CrossModelProjector(args, options(hidden_size=SOURCE), options(hidden_size=TARGET)).double()
    ours = PromptProjector(TOKENS, SOURCE, TARGET).double()
    reference = lambda: theirs.process_batch({"input_ids": randn(BATCH, 3, TARGET, seed=2)})["inputs_embeds"][0, :TOKENS]  # noqa: E731
    difference = measure(lambda: ours(randn(TOKENS, SOURCE)), reference, links(ours, theirs.proj[0], theirs.proj[2]))
    assert difference < 1e-12


def test_each_token_alone() -> None:
    """`AE_1_layer` of the first version, on the rows of a prompt."""
    code = definitions("Prompt-Transferability-1.0/tools/projector.py", "AE_1_layer")
    theirs = code.AE_1_layer(dim_0=SOURCE, dim_1=7, dim_2=TARGET).double()
    ours = PromptProjector(TOKENS, SOURCE, TARGET, hidden=7, by_token=True).double()
    prompt = randn(TOKENS, SOURCE)
    assert measure(lambda: ours(prompt), lambda: theirs(prompt), links(ours, theirs.encoder, theirs.decoder)) < 1e-12
    with torch.no_grad():
        assert (ours.first(prompt) < 0).any()
