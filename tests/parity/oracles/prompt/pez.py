"""PEZ beside its authors' search, token by token."""

from __future__ import annotations

import copy
import random
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn.functional import normalize

from tests.parity.measure import Row, perturb, randn
from tests.parity.oracle import Repository, options
from veneer.base_models.clip_features import BaseClip
from veneer.prompt_search import search

ORACLE = Repository("YuxinWenRick/hard-prompts-made-easy", "f22a1bec01991d94697304443cacbd66e0167e6b")
METHODS = ("pez",)
STEPS = 40


def rows() -> list[Row]:
    """Share of steps whose projected tokens differ."""
    model, tokenizer, targets = _clip(), SimpleTokenizer(), randn(3, 16)
    start = torch.randint(49000, (1, 5), generator=torch.Generator().manual_seed(0))
    theirs, ours = _official(model, tokenizer, targets, start), _ours(model, tokenizer, targets, start)
    assert len({tuple(step) for step in theirs}) > STEPS // 4  # the search moves
    different = sum(a != b for a, b in zip(theirs, ours[:STEPS], strict=True)) / STEPS
    text = "the best text is chosen by its own tokens when it is split again; start and end token are left out of the search"
    return [Row("pez", f"projected tokens of {STEPS} steps", different, deviations=text)]


def _clip() -> Any:
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 2}
    torch.manual_seed(0)
    model: Any = open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).double().eval().requires_grad_(False)
    perturb(model, 0.05)
    model.encode_image = lambda pixels: pixels

    def forward_text_embedding(rows: Tensor, ids: Tensor, images: Tensor) -> tuple[Tensor, None]:
        x = model.ln_final(model.transformer(rows + model.positional_embedding, attn_mask=model.attn_mask))
        x = x[torch.arange(len(x)), ids.argmax(-1)] @ model.text_projection
        return normalize(images, dim=-1) @ normalize(x, dim=-1).T, None

    model.forward_text_embedding = forward_text_embedding
    return model


def _official(model: Any, tokenizer: Any, targets: Tensor, start: Tensor) -> list[Any]:
    def semantic_search(queries: Tensor, corpus: Tensor, score_function: Any, **_: Any) -> list[Any]:
        values, indices = score_function(queries, corpus).max(1)
        return [[{"corpus_id": int(i), "score": float(value)}] for value, i in zip(values, indices, strict=True)]

    names = ("nn_project", "decode_ids", "initialize_prompt", "optimize_prompt_loop")
    code = ORACLE.definitions(
        "optim_utils.py", *names, semantic_search=semantic_search, dot_score=lambda a, b: a @ b.T,
        normalize_embeddings=lambda x: normalize(x, dim=1), copy=copy, random=random, print=lambda *text, **_: None,
    )  # fmt: skip
    path: list[Any] = []
    project = code.nn_project

    def record(*arguments: Any, **options_: Any) -> Any:
        result = project(*arguments, **options_)
        path.append(result[1][0].tolist())
        return result

    code.nn_project = record
    draw, torch.randint = torch.randint, lambda *arguments, **_: start
    try:
        fields = {"prompt_len": 5, "prompt_bs": 1, "iter": STEPS, "lr": 0.1, "weight_decay": 0.1, "print_step": None}
        arguments = options(batch_size=None, loss_weight=1.0, **fields)
        code.optimize_prompt_loop(model, tokenizer, model.token_embedding, targets, arguments, "cpu")
    finally:
        torch.randint = draw
    return path


def _ours(model: Any, tokenizer: Any, targets: Tensor, start: Tensor) -> list[Any]:
    path: list[Any] = []
    project, draw = search.nearest_rows, search.random_rows

    def record(*arguments: Any) -> Any:
        result = project(*arguments)
        path.append(result.tolist())
        return result

    search.nearest_rows, search.random_rows = record, lambda *arguments: start[0]
    try:
        base = BaseClip(model, lambda image: image, tokenizer)
        search.search_prompt(base, list(targets), search.SearchOptions(tokens=5, steps=STEPS, batch=3))
    finally:
        search.nearest_rows, search.random_rows = project, draw
    return path
