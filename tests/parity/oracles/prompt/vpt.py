"""VPT beside its authors' prompted transformer, on the blocks of a timm ViT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.measure import Row, measure
from tests.parity.models import DEPTH, WIDTH, images, links, perturb_trained, vits
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("KMnP/vpt", "4410440ec1b489f24f66b9fad3d9b10ff3443567")
METHODS = ("vpt",)
TOKENS = 3


class Layer(nn.Module):
    """A block that returns attention weights as well, of which there are none here."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """The block's output, and None."""
        return self.block(x), None


class Embeddings(nn.Module):
    """Patches, class token and positions of a timm ViT."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, tokens, width)."""
        out: Tensor = self.vit._pos_embed(self.vit.patch_embed(pixels))
        return out


def rows() -> list[Row]:
    """Deep prompts, with and without a projection."""
    compared = "a ViT: outputs, gradients"
    text = "prompts are removed before a pooling by mean, which the authors' MAE model includes by default"
    return [
        Row("vpt", f"deep, {compared}", _difference(0), deviations=text),
        Row("vpt", f"deep with `project`, {compared}", _difference(5)),
    ]


def _difference(project: int) -> float:
    model, bare = vits()
    code = ORACLE.definitions("src/models/vit_prompt/vit.py", "PromptedTransformer", Transformer=nn.Module)
    theirs: Any = code.PromptedTransformer.__new__(code.PromptedTransformer)
    nn.Module.__init__(theirs)
    theirs.embeddings, theirs.encoder = Embeddings(bare), nn.Module()
    theirs.encoder.layer, theirs.encoder.encoder_norm, theirs.encoder.vis = (
        nn.ModuleList(map(Layer, bare.blocks)),
        bare.norm,
        False,
    )
    theirs.prompt_config, theirs.vit_config = options(DEEP=True), options(transformer={"num_layers": DEPTH})
    theirs.num_tokens, theirs.prompt_dropout = TOKENS, nn.Dropout(0.0)
    theirs.prompt_proj = nn.Linear(project, WIDTH) if project else nn.Identity()
    theirs.prompt_embeddings = nn.Parameter(torch.zeros(1, TOKENS, project or WIDTH))
    theirs.deep_prompt_embeddings = nn.Parameter(torch.zeros(DEPTH - 1, TOKENS, project or WIDTH))
    perturb_trained(theirs)
    tuned = attach(model, "vpt", tokens=TOKENS, project=project)
    first, second = (tuned.parts[f"blocks.{i}.tokens"][1] for i in range(DEPTH))
    pairs: Any = [
        (first.prompt, lambda read: read(theirs.prompt_embeddings)[0]),
        (second.prompt, lambda read: read(theirs.deep_prompt_embeddings)[0]),
    ]
    if project:
        pairs += links(first.project, theirs.prompt_proj, weight="weight", bias="bias")
    return measure(lambda: model(images()), lambda: bare.head(theirs(images())[0][:, 0]), pairs)
