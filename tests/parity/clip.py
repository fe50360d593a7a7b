"""A small CLIP as the repositories of prompt learning have it, beside open_clip's with the same weights."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from tests.parity.measure import perturb
from tests.parity.oracle import Repository, options
from veneer.models.clip_classifier import CLIPClassifier

NAMES = ["toy cat", "dog", "red car"]
SHAPE = (32, 32, 4, 128, 8, 77, 49408, 64, 1, 4)
"""Embedding; image, layers, width and patch of one tower; context, vocabulary, width, heads and layers of the other."""
HALF = {".half()": ".double()", "torch.float32": "torch.float64"}
TOKENIZER = SimpleTokenizer()


def clip(repository: Repository, *design: dict[str, Any]) -> list[Any]:
    """The repository's CLIP in float64, one for each design of prompts, or one without a design. The first one is perturbed."""
    code = repository.definitions("clip/model.py", OrderedDict=OrderedDict, Tuple=tuple, Union=Any, replace=HALF)
    code.CLIP.dtype = property(lambda self: torch.float64)
    models = [code.CLIP(*SHAPE, *arguments).double() for arguments in ([(one,) for one in design] or [()])]
    perturb(models[0], 0.02)
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict(), strict=False)
    return models


def classifier(theirs: Any) -> Any:
    """veneer's classifier on open_clip's model with the weights of the repository's CLIP."""
    model = _open_clip()
    model.load_state_dict(theirs.state_dict(), strict=False)
    return CLIPClassifier(model, TOKENIZER, NAMES).double().eval()


def perturbed_classifier(names: list[str] = NAMES) -> Any:
    """veneer's classifier of `names` on open_clip's model with perturbed weights, frozen."""
    torch.manual_seed(0)
    model = _open_clip()
    perturb(model, 0.02)
    return CLIPClassifier(model, TOKENIZER, names).double().eval().requires_grad_(False)


def _open_clip() -> Any:
    vision = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 4}
    return open_clip.model.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, quick_gelu=True).double()


def encode_rows(model: Any, rows: Tensor, ids: Tensor) -> Tensor:
    """Text features (n, features) of token rows (n, length, width) with the ids (n, length), by open_clip's modules."""
    x = model.ln_final(model.transformer(rows + model.positional_embedding[: rows.shape[1]], attn_mask=model.attn_mask))
    features: Tensor = x[torch.arange(len(x)), ids.argmax(-1)] @ model.text_projection
    return features


def tokenize(texts: Any, context_length: int = 77) -> Tensor:
    """Ids of texts, as `clip.tokenize` of OpenAI's repository returns them."""
    texts = [texts] if isinstance(texts, str) else texts
    out = torch.zeros(len(texts), context_length, dtype=torch.int)
    for row, text in zip(out, texts, strict=True):
        ids = [TOKENIZER.sot_token_id, *TOKENIZER.encode(text), TOKENIZER.eot_token_id]
        row[: len(ids)] = torch.tensor(ids)
    return out


CLIP = options(tokenize=tokenize)
"""Stands for the module `clip` in the repositories' trainers."""
