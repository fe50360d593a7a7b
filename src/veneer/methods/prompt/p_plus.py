"""P+: new tokens with another embedding for each cross-attention layer of the UNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.injection.errors import OptionError
from veneer.injection.method import Need
from veneer.injection.sites import VocabularySite

from ._new_tokens import NewTokenAdapter, NewTokens


class PPlusAdapter(NewTokenAdapter):
    """rows[i] = vectors[k, l] where ids[i] is the k-th new id and l the layer of the row. `vectors`: (tokens, L, width)."""

    def __init__(self, site: VocabularySite, method: PPlus, layers: int) -> None:
        super().__init__(site, method, (layers,))
        self.layers = layers

    def contains(self, ids: Tensor) -> Tensor:
        """True (batch,) for rows of ids (batch, length) with a new id."""
        return torch.isin(ids, self.new_ids).any(-1)

    def output(self, x: Tensor, layer: Tensor, y: Tensor) -> Tensor:
        """x: ids (batch, length); layer: (batch,) of each row; y: embeddings (batch, length, width)."""
        hits = x.unsqueeze(-1) == self.new_ids
        index = hits.to(torch.uint8).argmax(-1) * self.layers + layer[:, None]
        return torch.where(hits.any(-1, keepdim=True), F.embedding(index, self.vectors.flatten(0, 1)), y)


@dataclass(frozen=True)
class PPlus(NewTokens):
    """v*_1 … v*_L = argmin E ‖ε − ε_θ(z_t, t, c(v_1), …, c(v_L))‖²: cross-attention layer l of the UNet reads c(v_l).
    v_l is the embedding of the new token for layer l, and c the text encoder.

    A new token has one embedding v_l for each of the L cross-attention layers, in the order of the forward pass; table, text
    encoder and UNet are frozen. A prompt with the token is encoded L times, once for each layer, others once. `pipe(prompt)`
    needs no other arguments. At strength s a token's embedding is (1 − s)·known + s·v_l, where `known` is that of its
    initializer token: when disabled, a prompt with the token equals the prompt with that word.

    Args:
        tokens: one or several new tokens; `veneer personalize` sets the one of `--concept`.
        initialize: initializer word or words, one text for all tokens or one per token; all layers are initialized alike. `veneer
            personalize` sets `--class-word`. Empty: normal with mean 0 and the standard deviation of the embedding table.
        subtokens: for an initializer word of several sub-tokens, use the `mean` of their embeddings, or the `first`.
        ids: in Python, ids of the tokens, in order, for a bare text encoder without a tokenizer.
        layers: in Python, L for a bare text encoder; 0 for the number of cross-attention layers of the pipeline's UNet.
    Supports pipelines of a UNet with CLIP text encoders: Stable Diffusion 1.x, 2 and XL. The text states of all layers leave the
    text encoder side by side, (batch, tokens, L·width), which ControlNets and `clip_skip` do not support. Saved
    as a native file only: embedding files of diffusers, ComfyUI and A1111 have one embedding for all layers.
    Counts: tokens·L·width per text encoder; SD 1.5 16·768 = 12,288, SDXL 70·(768 + 1,280) = 143,360 for one token.
    Source: Voynov et al., P+: Extended Textual Conditioning in Text-to-Image Generation, 2023, section 4 ("XTI"): all layers are
    trained together, 5e-3, 500 steps. The authors have published no code for Stable Diffusion. Chosen here: a pooled text
    embedding (SDXL, the bundled base model) is the mean over the layers; learned rows are stored beside the table.
    """

    name: ClassVar[str] = "p_plus"
    uses: ClassVar[tuple[str, ...]] = ("few_photos",)
    paper: ClassVar[str] = "Voynov et al., P+: Extended Textual Conditioning in Text-to-Image Generation, 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(VocabularySite, where={"readers": ...}),)
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 5e-3

    tokens: str | tuple[str, ...] = "<concept>"
    initialize: str | tuple[str, ...] = ""
    subtokens: Literal["mean", "first"] = "mean"
    ids: tuple[int, ...] = ()
    layers: int = 0

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise OptionError.of(self.name, "layers", self.layers, "at least 0")
        self.check_options()

    @classmethod
    def examples(cls) -> tuple[PPlus, PPlus]:
        """For bare text encoders without a tokenizer: ids beyond any small table."""
        return cls(tokens=("<one>", "<two>"), ids=(90_000, 90_001), layers=3), cls(tokens="<three>", ids=(90_002,), layers=3)

    def build(self, site: VocabularySite) -> PPlusAdapter:
        """Zero vectors; they are initialized when attached.

        Raises:
            ValueError: the tokenizer already has a token; ids or layers are needed, or known without them.
        """
        self.check_site(site)
        return PPlusAdapter(site, self, self._layers(site))

    def _layers(self, site: VocabularySite) -> int:
        """Number of the cross-attention layers that read the text."""
        layers = len(site.readers.cross)
        if self.layers and layers:
            message = f"the pipeline's UNet has {layers} cross-attention layers; leave layers out"
            raise OptionError(message, option="layers", method=self.name, given=self.layers, expected=layers)
        if not self.layers and not layers:
            message = "a text encoder without a UNet: attach to the pipeline, or pass layers, the number of cross-attentions"
            raise OptionError(message, option="layers", method=self.name, given=0, expected="at least 1")
        return layers or self.layers

    def count(self, site: VocabularySite) -> int:
        """tokens·L·width."""
        return len(self.each) * self._layers(site) * site.width
