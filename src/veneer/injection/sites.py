"""Site types: what a host offers and a method may adapt. They are frozen and hold names, no tensors. Paths are of modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal["NLC", "NHWC", "NCHW"]
Kind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True)
class Port:
    """Where a tensor can be read or written: the first argument (`in`) or the output (`out`) of the module at `path`."""

    path: str
    side: Literal["in", "out"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in a model that a method can adapt.

    Args:
        name: dotted, stable and unique in the model; the key of saved tensors.
        role: what it does, such as `attn.q`; selections match roles.
        depth: index of the block, counted through the tower, or None outside blocks.
        tower: `vision`, `text`, `text_2`, `unet`, `dit`, …
        stage: `down.0`, `mid`, `up.1`, … or None.
        component: attribute of the pipeline that holds the tower, or `""` for a bare model.
        guard: attribute path that must keep its value while attached (for example `attn1.fused_projections`), or None.
        inert: True if the architecture cancels or drops the site's effect, so that no output depends on it: the bias of
            the keys under a plain softmax, the text queries of the last joint block. Counted, but not probed.
    """

    name: str
    role: str
    depth: int | None = None
    tower: str = ""
    stage: str | None = None
    component: str = ""
    guard: str | None = None
    inert: bool = False

    @property
    def guard_key(self) -> str:
        """The guard's path in the pipeline."""
        return f"{self.component}.{self.guard}"


@dataclass(frozen=True, kw_only=True)
class WeightSite(Site):
    """A weight of a linear, convolution or embedding: its tensor, or its module's input and output.

    Args:
        path: the module. `param` is the tensor in it.
        rows: (start, stop) of the output rows inside a fused weight, or None for the whole tensor.
        fused: True for a fused weight whose row slices are sites as well; globs skip it, only its exact name selects it.
        kind: `linear` (d_out, d_in), `conv` (d_out, d_in / groups, *kernel) or `embedding` (rows d_in, width d_out).
        d_out, d_in: widths (of the slice, if `rows` is given). `kernel`, `stride`, `padding`, `dilation`, `groups`: of a conv.
        called: True if hooks fire on the module and see a product with the tensor; False if it is read or standardized first.
        bias: path of the bias that is added after it, with the parameter's name (`blocks.0.attn.q_bias`), or "" for none.
        bias_rows: (start, stop) in that bias, or None for all of it.
        heads: attention heads at the input of an output projection, else None. `attention`: path of their module, or "".
        sdpa: True if that module calls `F.scaled_dot_product_attention`, so that keys and values can be added.
    """

    path: str
    param: str = "weight"
    rows: tuple[int, int] | None = None
    fused: bool = False
    kind: Kind = "linear"
    d_out: int
    d_in: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    called: bool = True
    bias: str = ""
    bias_rows: tuple[int, int] | None = None
    heads: int | None = None
    attention: str = ""
    sdpa: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the (slice of the) weight tensor."""
        if self.kind == "embedding":
            return (self.d_in, self.d_out)
        return (self.d_out, self.d_in // self.groups, *self.kernel)


@dataclass(frozen=True, kw_only=True)
class NormSite(Site):
    """A norm that the host calls, with a scale: y = norm(x) ∘ weight + bias.

    Args:
        path: the module. `param`: its scale. `bias`: path of its shift, with the parameter's name, or "" for none.
        width: number of channels. `channel_dim`: the channel dimension of its output.
        called: False if something follows inside the module (an activation), so that only its tensors can be adapted.
    """

    path: str
    param: str = "weight"
    bias: str = ""
    width: int
    channel_dim: int = -1
    called: bool = True
    rows: None = None


@dataclass(frozen=True, kw_only=True)
class BranchSite(Site):
    """A residual branch: read before or after its norm, write where its output is added to the stream.

    Args:
        read: the stream, as input of the branch. `normed`: the same after the branch's norm; None without a norm before it.
        write: the branch's output, before it is added. `width`: number of channels. `layout`: order of the dimensions.
        prefix_tokens: class and register tokens before the patches. `grid`: (height, width) of the patches at the image size of
            the model, or None if the tokens have no grid; only `NLC` needs them.
    """

    read: Port
    write: Port
    normed: Port | None = None
    width: int
    layout: Layout = "NLC"
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class StreamSite(Site):
    """The residual stream through one block: the block's input and output.

    Args:
        d_in: channels of the input, if a block changes them; 0 for `width`, the channels of the output.
        resamples: the block changes the grid. `can_drop`: it can run on some of the tokens. Others: as for `BranchSite`.
    """

    path: str
    width: int
    d_in: int = 0
    resamples: bool = False
    can_drop: bool = False
    layout: Layout = "NLC"
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class TokenSite(Site):
    """The token sequence of one block (role `tokens.block`) or of the whole tower (role `tokens.tower`).

    Args:
        enter: port at which tokens may be inserted. `leave`: port at which inserted tokens must be removed again.
        prefix_tokens: class and register tokens; inserted tokens follow them.
        patch: height and width of a patch in pixels, and channels of the image, for initializations that use them.
        can_insert: False if the host fixes the length (windows, rotary tables, pooled grids).
    """

    enter: Port
    leave: Port
    width: int
    prefix_tokens: int = 0
    patch: tuple[int, int, int] = (16, 16, 3)
    can_insert: bool = True


@dataclass(frozen=True, kw_only=True)
class ParamSite(Site):
    """A base parameter (bias, norm weight, free parameter) that may be trained or given a delta.

    Args:
        path, param: the module and the parameter in it. `rows`: (start, stop) in a fused parameter, or None.
        shape: of the parameter (of the slice, if `rows` is given).
        called: True for a bias that its module adds last, so that a delta may be added to the module's output.
        channel_dim: the output dimension that it is added along, if `called`. `prompted`: True beside a `PromptSite`.
    """

    path: str
    param: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    called: bool = False
    channel_dim: int = -1
    prompted: bool = False


@dataclass(frozen=True, kw_only=True)
class VocabularySite(Site):
    """Rows of a token-embedding table.

    Args:
        path: the embedding module. `ids`: port at which the token ids enter (argument `argument` of that module).
        rows, width: size of the base table. `tokenizer`: the tokenizer of the ids, or None for a bare model.
        readers: `attention_sites.TextReaders` of the text states, or None if they are read in another way.
    """

    path: str
    ids: Port
    argument: str = "input_ids"
    rows: int
    width: int
    tokenizer: Any = field(default=None, compare=False, repr=False)
    readers: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class PixelSite(Site):
    """The model's image input: channels, height and width in pixels, mean and std of the normalization."""

    port: Port
    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FeatureSite(Site):
    """Pooled features, the input of the head (role `features`), or the head's logits (role `logits`).

    Args:
        port: where features enter the head, or logits leave it. `read`: the features, for both. `tokens`: before pooling.
        width: of the features. `head`: path of the head. `classes`: its number of classes; 0 if it has none.
    """

    port: Port
    read: Port | None = None
    tokens: Port | None = None
    width: int
    classes: int = 0
    head: str


@dataclass(frozen=True, kw_only=True)
class PromptSite(Site):
    """The prompts of a classifier's classes: the class weights that a text tower computes from them.

    The module at `path` takes image features (batch, features) and returns the class weights ([batch,] classes, features). It
    offers `embed(ids)`, `bare(ids)` without adapters, and their `table`; `encode(ids, rows, between)`: normalized features of
    prompts with these embeddings, changed by between(i, x) before block i > 0; `alone`: at most one adapter changes the weights.

    Args:
        width: of the token embeddings. `features`: width of the class weights.
        classes: their names, as in the prompts. `tokenizer`: the tokenizer, with the length of prompts.
    """

    path: str
    width: int
    features: int
    classes: tuple[str, ...]
    tokenizer: Any = field(compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class ResidualSite(Site):
    """UNet skip and mid features to which control residuals are added, as arguments of the tower's call.

    Args:
        widths: channels of each down residual, then of the middle. `strides`: of each relative to the latent.
        inner_widths, inner_strides: of the features inside the down blocks. `pixels`: image pixels per latent pixel, on a side.
        path: the called module. `arguments`: names of its arguments. `skips`, `middle`, `inner`: those for residuals.
        first: path of the first block. `encoder(channels, widths)`: builds an untrained copy of the encoder, with zero
            convolutions after it, for hint images with this number of channels and an embedding of these widths.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    inner_widths: tuple[int, ...] = ()
    inner_strides: tuple[int, ...] = ()
    pixels: int = 8
    path: str = ""
    arguments: tuple[str, ...] = ()
    skips: str = ""
    middle: str = ""
    inner: str = ""
    first: str = ""
    encoder: Any = field(default=None, compare=False, repr=False)
