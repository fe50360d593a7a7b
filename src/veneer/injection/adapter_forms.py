"""Adapter forms: the methods that an adapter may implement, and where each of them is called.

An adapter is a subclass of `Adapter` that implements the form which its site needs. No base class besides `Adapter` is required:
the forms are protocols, checked once, when the adapter is attached.

| form | methods | sites | called by |
| --- | --- | --- | --- |
| `OutputAdapter` | `output(x, y)` | called weights, parameters and norms; branches, streams, features, images | `CallSeam` |
| `InPlaceOutputAdapter` | `output(x, y, overwrite)`, with `overwrites = True` | the same | `CallSeam` |
| `InputAdapter` | `input(x)` | weights that are called | `CallSeam` |
| `WeightAdapter` | `weight(W)` | weights, parameters and norms that the host reads; merging | `WeightSeam` |
| `BiasAdapter` | and `bias(b, W)` | weights followed by a bias | `WeightSeam` |
| `LowRankAdapter` | and `factors()` | merging and combining | `composition.merge` |
| `TokenAdapter` | `insert(tokens)`, `remove(tokens)` | `TokenSite`; `StreamSite` to leave out tokens | `TokenSeam` |
| `ImagePromptAdapter` | `output(x, y)`, `append(i, tokens)`, `remove(i, tokens)` | `MultimodalPromptSite` | `PromptSeam` |
| `VocabularyAdapter` | `ids(ids)`, `output(ids, rows)` | `VocabularySite` | `VocabularySeam` |
| `LayeredVocabularyAdapter` | `ids(ids)`, `contains(ids)`, `output(ids, layer, rows)` | the same | `LayeredVocabularySeam` |
| `AttentionAdapter` | `attend(inner, attn, hidden_states, **kwargs)` | `AttentionSite` | `ProcessorSeam` |
| | the same | `SelfAttentionSite` | `SelfAttentionSeam` |
| `KeyValueAdapter` | `keys_values()` | weights of output projections with `sdpa` | `KeyValueSeam` |
| | the same | `SelfAttentionSite` with `can_extend` | `KeyValueSeam` |
| `InputKeyValueAdapter` | `keys_values_of(x)` | the same two | `KeyValueSeam` |
| `KeyChoiceAdapter` | `choose(x, mask, exact)` | `SelfAttentionSite`, `AttentionSite` | `KeyChoiceSeam` |
| `ResidualAdapter` | `residuals(call)` | `ResidualSite` | `ResidualSeam` |
| `FeatureAdapter` | and `change(features)` at `place` | `ResidualSite` | `ResidualSeam` |

An adapter that implements both `output` and `weight` computes the same function in both; the conformance suite compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .sites import Port


class FormMeta(type(Protocol)):  # type: ignore[misc]
    """Metaclass of the forms: `isinstance` looks for the attributes of a form, which Python 3.11 collects anew each time."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if not cls.__dict__.get("_is_protocol"):
            return bool(super().__instancecheck__(instance))
        if "_members" not in cls.__dict__:
            declared = [{*vars(base), *vars(base).get("__annotations__", ())} for base in cls.__mro__ if base is not Protocol]
            cls._members = tuple(sorted(name for name in set().union(*declared) if not name.startswith("_")))
        return all(hasattr(instance, name) for name in cls._members)


class Blended(Protocol, metaclass=FormMeta):
    """What every seam reads of an adapter; `Adapter` has all of it."""

    @property
    def strength(self) -> Tensor:
        """Buffer (): 0 is the host, 1 the adapter."""

    @property
    def applies_strength(self) -> bool:
        """True if the form multiplies by `strength` itself."""

    @property
    def casts(self) -> bool:
        """True if x comes in the adapter's dtype."""


@runtime_checkable
class OutputAdapter(Blended, Protocol):
    """Changes the output of a host module."""

    def output(self, x: Tensor, y: Tensor, /) -> Tensor:
        """y', in the shape of y. `x`: what the site reads; `y`: the host's own output there."""


class InPlaceOutputAdapter(OutputAdapter, Protocol):
    """Changes the output of a host module, in place if nothing else holds it. Says `overwrites = True`."""

    def output(self, x: Tensor, y: Tensor, overwrite: bool = False, /) -> Tensor:
        """y', in the shape of y. `overwrite`: y may be modified in place."""


@runtime_checkable
class InputAdapter(Blended, Protocol):
    """Changes the input of a host module: for changes that are cheaper there than in the output."""

    def input(self, x: Tensor, /) -> Tensor:
        """x', in the shape of x."""


@runtime_checkable
class WeightAdapter(Blended, Protocol):
    """Changes a weight: for tensors that the host reads, and for merging."""

    def weight(self, weight: Tensor, /) -> Tensor:
        """W', in the shape of W."""


@runtime_checkable
class BiasAdapter(WeightAdapter, Protocol):
    """Changes a weight and the bias that follows it."""

    def bias(self, bias: Tensor, weight: Callable[[], Tensor], /) -> Tensor:
        """b', in the shape of b. `weight`: returns W as the adapter receives it."""


@runtime_checkable
class LowRankAdapter(WeightAdapter, Protocol):
    """Adds a product of low rank to a weight: merging takes about a copy of W, and combining needs no matrix of W's size."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """C (groups, d_out / groups, rank) and D (groups, rank, width) at `strength`: W' = W + C D, W flattened by groups."""


@runtime_checkable
class PairAdapter(LowRankAdapter, Protocol):
    """A LoRA: its low-rank product is B A times a scaling."""

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / √rank."""

    def pair(self) -> tuple[Tensor, Tensor]:
        """`down` and `up`, without the scaling."""


@runtime_checkable
class TokenAdapter(Blended, Protocol):
    """Inserts tokens into a sequence, or leaves out some."""

    def insert(self, tokens: Tensor, /) -> Tensor:
        """The sequence with the inserted tokens, or without the left out ones, where the extent of the site begins."""

    def remove(self, tokens: Tensor, /) -> Tensor:
        """The sequence of the host's length, where it ends."""


@runtime_checkable
class ImagePromptAdapter(OutputAdapter, Protocol):
    """Changes class weights, and appends tokens to the sequence of an image tower."""

    @property
    def depth(self) -> int:
        """Number of blocks of the image tower before which tokens are appended, from the first."""

    def append(self, index: int, tokens: Tensor, /) -> Tensor:
        """The sequence with more tokens at its end, before a block."""

    def remove(self, index: int, tokens: Tensor, /) -> Tensor:
        """The sequence without the tokens that were appended before block `index`."""


@runtime_checkable
class VocabularyAdapter(Blended, Protocol):
    """Embeds new token ids."""

    def ids(self, ids: Tensor, /) -> Tensor:
        """Token ids that the host's embedding table has."""

    def output(self, ids: Tensor, rows: Tensor, /) -> Tensor:
        """The rows of the table with the trained embeddings of the new ids."""


@runtime_checkable
class LayeredVocabularyAdapter(Blended, Protocol):
    """Embeds new token ids, for each cross-attention layer that reads the text in another way."""

    @property
    def layers(self) -> int:
        """Number of cross-attention layers."""

    def ids(self, ids: Tensor, /) -> Tensor:
        """Token ids that the host's embedding table has."""

    def contains(self, ids: Tensor, /) -> Tensor:
        """True (batch,) for the rows of ids (batch, length) with new ids."""

    def output(self, ids: Tensor, layer: Tensor, rows: Tensor, /) -> Tensor:
        """The rows of the table with the trained embeddings of the new ids. `layer`: (batch,), of each row of ids."""


@runtime_checkable
class AttentionAdapter(Blended, Protocol):
    """Wraps attention: the processor of a module of diffusers, or a self-attention without a processor."""

    def attend(self, inner: Callable[..., Any], attn: Any, hidden_states: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """The output of attention. `inner`: what it wraps. `attn`: the module, or `AttentionLayers` if it has no processor."""


@runtime_checkable
class KeyValueAdapter(Blended, Protocol):
    """Adds keys and values to an attention module, to which all of its queries attend."""

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys and values, both (heads, added tokens, channels of a head), as they enter the softmax attention."""


@runtime_checkable
class InputKeyValueAdapter(Blended, Protocol):
    """Adds keys and values that depend on what an attention module reads. Takes precedence over `KeyValueAdapter`."""

    def keys_values_of(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """Keys and values, both (batch, heads, added tokens, channels of a head). x: the module's first argument, batch first."""


@runtime_checkable
class KeyChoiceAdapter(Blended, Protocol):
    """Chooses the keys that each query of a self-attention reads."""

    def choose(self, x: Tensor, mask: Tensor, exact: Callable[[], Tensor], /) -> Tensor:
        """True for the chosen keys, (batch, heads or 1, tokens, tokens).

        Args:
            x: what the attention module reads, (batch, tokens, width). `mask`: float mask, added to the scores.
            exact: returns the scores with the mask, (batch, heads, tokens, tokens), without gradients.
        """


@dataclass(frozen=True)
class Residuals:
    """Residuals that an adapter adds in one forward pass, each optional.

    Args:
        skips: one per skip feature. `middle`: for the middle block.
        inner: one per down block (and the middle block), added inside it.
    """

    skips: Sequence[Tensor] | None = None
    middle: Tensor | None = None
    inner: Sequence[Tensor] | None = None


@runtime_checkable
class ResidualAdapter(Blended, Protocol):
    """Adds residuals to skip and middle features of a UNet or transformer, from conditions."""

    @property
    def conditions(self) -> Any:
        """The `CallConditions` of the forward pass, or None."""

    def residuals(self, call: Mapping[str, Any], /) -> Residuals:
        """Residuals at strength 1. `call`: the arguments of the host's call by name."""


@runtime_checkable
class FeatureAdapter(ResidualAdapter, Protocol):
    """Adds residuals, and changes the features at one port besides."""

    place: Port

    def change(self, features: Tensor, /) -> Tensor:
        """What is added to the features, at strength 1."""


@runtime_checkable
class BatchedAdapter(OutputAdapter, Protocol):
    """Computes a mixed batch, whose samples have different adapters, in one step."""

    def batched_output(
        self, adapters: Sequence[tuple[Any, float] | None], x: Tensor, y: Tensor, overwrite: bool, /
    ) -> Tensor | None:
        """`output` of n samples, each with an adapter and a strength or None; batch rows i, i + n, … belong to sample i.

        None if these adapters cannot be computed together. `overwrite`: y may be modified in place.
        """


@runtime_checkable
class SwappableAdapter(WeightAdapter, Protocol):
    """Loads the state of a smaller adapter of its method, without a change of shapes."""

    def state_from(self, other: Any, /) -> dict[str, Tensor]:
        """The state with which this adapter computes what `other` does; no change for None.

        Raises:
            ValueError: `other` is larger than this adapter.
        """


@runtime_checkable
class CheckedAdapter(Protocol):
    """Has tensors that must be consistent, such as indices, and state that depends on them."""

    def check_state(self, tensors: Mapping[str, Tensor], /) -> None:
        """Checks the tensors of a file before any is loaded.

        Raises:
            ValueError: they are inconsistent.
        """

    def after_load(self) -> None:
        """Called after tensors of this adapter were loaded."""
