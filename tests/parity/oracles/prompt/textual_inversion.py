"""Textual Inversion beside its authors' manager of embeddings."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from tests.parity.measure import Row, largest_difference, measure
from tests.parity.oracle import Repository, options
from veneer.injection import attach
from veneer.testing.pipelines import tiny_pipeline

ORACLE = Repository("rinongal/textual_inversion", "424192de1518a358f1b648e0e781fdbe3f40c210")
METHODS = ("textual_inversion",)
LENGTH = 24
NEW, OLD, INITIAL = ("<toy>", "<cat>"), ("*", "@"), ("beach", "photo")
TEXTS = ("a photo of {0} on the beach", "{1} and {0} and {1}")
TEXT = "without an initializer word, rows are uniform from 0 to 1 in the code"


def rows() -> list[Row]:
    """Two tokens in the texts of a tiny Stable Diffusion, with one vector and with three."""
    difference = max(_difference(vectors) for vectors in (1, 3))
    compared = "embeddings of texts with two tokens: initial rows, outputs, gradients"
    return [Row("textual_inversion", compared, difference, deviations=TEXT)]


def _difference(vectors: int) -> float:
    pipe, plain = tiny_pipeline("sd"), tiny_pipeline("sd")
    table = plain.text_encoder.get_input_embeddings().double().requires_grad_(False)
    encoder = options(tknz_fn=lambda word: torch.tensor([plain.tokenizer(word).input_ids]), transformer=options(token_emb=table))
    code = ORACLE.definitions(
        "ldm/modules/embedding_manager.py", "EmbeddingManager", "get_bert_token_for_string", per_img_token_list=[],
        replace={"token_dim = 1280": f"token_dim = {table.embedding_dim}"},
    )  # fmt: skip
    theirs = code.EmbeddingManager(encoder, list(OLD), list(INITIAL), num_vectors_per_token=vectors)
    pipe.text_encoder.double()
    tuned = attach(pipe, "textual_inversion", tokens=NEW, vectors=vectors, initialize=INITIAL)
    adapter: Any = next(iter(tuned.parts.values()))[1]
    parameters = [theirs.string_to_param_dict[word] for word in OLD]
    initial = largest_difference([(adapter.vectors, torch.cat([*parameters]))])
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.data.normal_(generator=generator)
    ids, other = _encode(pipe, NEW), _encode(plain, OLD)
    run = (lambda: adapter.output(ids, table(adapter.ids(ids))), lambda: theirs(other.clone(), table(other)))
    return max(initial, measure(*run, [(adapter.vectors, lambda read: torch.cat([read(p) for p in parameters]))]))


def _encode(pipe: Any, tokens: tuple[str, ...]) -> Tensor:
    """Ids of the texts; new tokens of several vectors are expanded as in diffusers."""
    texts = [
        TextualInversionLoaderMixin._maybe_convert_prompt(pipe, text.format(*tokens), pipe.tokenizer)  # type: ignore[arg-type]
        for text in TEXTS
    ]
    ids: Tensor = pipe.tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    return ids
