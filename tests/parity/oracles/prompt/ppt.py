"""PPT's prompts in the prompts of classes beside its authors' embedding layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tests.parity.clip import NAMES, encode_rows, perturbed_classifier, tokenize
from tests.parity.measure import Row, measure, perturb, randn
from tests.parity.models import link
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("thu-coai/PPT", "dad6f2da91bc354999ba6ab8571b484417e3d0a1")
METHODS = ("ppt",)
TOKENS = 4


def rows() -> list[Row]:
    """Class weights of a CLIP, after initial values of words and a perturbation."""
    model: Any = perturbed_classifier()
    tuned = attach(model, "ppt", tokens=TOKENS, initialize="uniform")
    ours: Any = tuned.parts["head.prompts"][1]
    table = model.clip.token_embedding
    ids = tokenize([f"{'X ' * TOKENS}{name}." for name in NAMES]).long()
    theirs = _embeddings(table, ids[0, 1 : 1 + TOKENS])
    negative = ids.clone()
    negative[:, 1 : 1 + TOKENS] = -1 - torch.arange(TOKENS)

    def official() -> Tensor:
        return normalize(encode_rows(model.clip, theirs.get_input_embeds(negative), ids), dim=-1)

    pairs = [(ours.context, link(theirs.prompt_embeds.weight))]
    text = (
        "not compared: the tasks of the pre-training, which are neighboring sentences in the code, crops and pseudo-labels here; "
        "the code has its prompts in T5"
    )
    difference = measure(lambda: ours.weights(randn(1, 32)), official, pairs)
    return [Row("ppt", "prompts among the token embeddings of a CLIP: class weights, gradients", difference, deviations=text)]


def _embeddings(table: nn.Module, initial: Tensor) -> Any:
    """The authors' transformer without blocks, with prompts at the ids −1 to −p."""
    code = ORACLE.definitions(
        "mpu/transformer_enc_dec.py", "ParallelTransformer", "LayerNorm", ParallelBlock=None, EncDecConfig=None,
        VocabParallelEmbedding=None, unscaled_init_method=lambda **o: None,
        deepspeed=options(checkpointing=options(is_configured=lambda: False)),
        replace={".half()": ".double()", ".float()": ".double()"},
    )  # fmt: skip
    width = {"d_model": table.embedding_dim, "layer_norm_epsilon": 1e-6, "init_method_std": 1.0}
    config = options(**width, num_layers=0, dropout_rate=0.0, use_scaled_init_for_output_weights=False)
    theirs = code.ParallelTransformer(config, table, {"prompt_len": len(initial), "init_ids": initial})
    theirs.init_prompt_embeds()
    perturb(theirs.prompt_embeds, 0.1)
    return theirs
