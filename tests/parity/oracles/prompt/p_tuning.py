"""P-Tuning beside its authors' prompt encoder."""

from __future__ import annotations

import torch

from tests.parity.measure import Row, measure
from tests.parity.models import link, links, perturb_trained
from tests.parity.oracle import Repository, options
from veneer.methods.prompt.soft_prompts.p_tuning import LSTMEncoder

ORACLE = Repository("THUDM/P-tuning", "f4225d4d8003868b31ed659dfe9732a351ad42d9")
METHODS = ("p_tuning",)


def rows() -> list[Row]:
    """Encoded prompts of a bidirectional LSTM and an MLP."""
    code = ORACLE.definitions("LAMA/p_tuning/prompt_encoder.py", "PromptEncoder", print=lambda text: None)
    theirs = code.PromptEncoder((2, 2, 1), 8, None, "cpu", options(lstm_dropout=0.0))
    perturb_trained(theirs)
    ours, context = LSTMEncoder(8, 0.0).double(), torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    names = {
        name: name.replace("lstm.", "lstm_head.").replace("head.0", "mlp_head.0").replace("head.2", "mlp_head.2")
        for name, _ in ours.named_parameters()
    }
    pairs = [*links(ours, theirs, **names), (context, link(theirs.embedding.weight))]
    return [Row("p_tuning", "encoded prompts, gradients", measure(lambda: ours(context), lambda: theirs(), pairs))]
