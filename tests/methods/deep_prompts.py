"""Prompts in both towers of a small CLIP, written out block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.methods.classifiers import row, token

START, END = 62, 63
NAMES = (("toy", "cat"), ("dog",), ("red", "car"))
KEYS = {"vit": 16, "timm": 160}
"""Small CLIPs with a vision transformer to the side of their images."""


def text_features(clip: Any, prompts: Sequence[Tensor], words: Sequence[str]) -> Tensor:
    """Features (classes, width) of [start] prompt words name . [end]; `prompts` (M, width) of the first blocks, in order."""
    text = getattr(clip, "text", clip)
    features = []
    for name in NAMES:
        prompt = [START, *prompts[0], *(token(w) for w in (*words, *name, ".")), END]
        x = (row(clip, prompt) + text.positional_embedding)[None]
        for index, block in enumerate(text.transformer.resblocks):
            if 0 < index < len(prompts):
                x = x.clone()
                x[:, 1 : 1 + len(prompts[index])] = prompts[index]
            x = block(x, attn_mask=text.attn_mask)
        features.append(text.ln_final(x)[0, len(prompt) - 1] @ text.text_projection)
    return torch.stack(features)


def image_features(clip: Any, image: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Features (batch, width) with tokens behind the patches; `prompts` (n, width) of the first blocks, in order."""
    visual = clip.visual
    trunk = getattr(visual, "trunk", None)
    blocks = visual.transformer.resblocks if trunk is None else trunk.blocks
    x = visual._embeds(image) if trunk is None else trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(image)))
    count = x.shape[1]
    for index, block in enumerate(blocks):
        if index < len(prompts):
            prompt = prompts[index].expand(len(x), -1, -1)
            norm = visual.ln_pre if trunk is None else trunk.norm_pre
            x = torch.cat([x[:, :count], prompt if index else norm(prompt)], 1)
        x = block(x)
    if trunk is None:
        return visual.ln_post(x[:, 0]) @ visual.proj
    return visual.head(trunk.forward_head(trunk.norm(x[:, :count])))


def cosine_logits(clip: Any, features: Tensor, weights: Tensor) -> Tensor:
    """exp(scale)·cos(f, w) for all pairs."""
    return clip.logit_scale.exp() * torch.cosine_similarity(features[:, None], weights[None], -1)
