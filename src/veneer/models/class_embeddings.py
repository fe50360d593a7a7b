"""Class embeddings of a CLIP's text tower, cached while the tower is frozen and unmodified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from veneer.injection.seams.adapter_calls import base_tensor

from .tokenizer import PromptTokenizer, TextError

Between = Callable[[int, Tensor], Tensor]
"""(index of a block, its input) to the changed input."""

PROMPTS = 1024
"""Prompts per forward pass of the text tower."""


class ClassEmbeddings(nn.Module):
    """Class weights W (classes, features): for each class the mean over templates of its normalized text features.

    W is cached while the text tower is frozen and has no hooks. While the tower has a hook, a parametrization or a trainable
    tensor, W is computed in every forward pass, with gradients if they are enabled. Changed tensors are detected by version and
    data pointer; writes through `.data` change neither and need `clear_cache()`.

    Args:
        clip: the model, not registered as a child module. `names`: of the classes. `templates`: prompts, `{}` for the name.
        tokenizer: of the model.

    Attributes:
        accepts_embeddings: True if `encode` accepts token embeddings, of `width`.
    Raises:
        TextError: a template without `{}`, or prompts too long for the tower.
    """

    clip: nn.Module
    ids: Tensor

    def __init__(self, clip: nn.Module, names: Sequence[str], templates: Sequence[str], tokenizer: PromptTokenizer) -> None:
        super().__init__()
        wrong = [t for t in templates if "{}" not in t]
        if wrong or not templates or not names:
            raise TextError(
                f"templates: {wrong or (templates, names)}; expected {{}} for the class name in each, and at least one class.",
                where="templates",
                given=tuple(wrong),
            )
        self.__dict__["clip"] = clip  # not registered as a child module
        self.names, self.tokenizer = tuple(name.replace("_", " ") for name in names), tokenizer
        texts = [template.replace("{}", name) for name in self.names for template in templates]
        self.register_buffer("ids", tokenizer.ids(texts).unflatten(0, (len(names), -1)), persistent=False)
        self.accepts_embeddings = can_encode_embeddings(clip) and tokenizer.brackets
        self.width = int(text_tower(clip).token_embedding.embedding_dim) if self.accepts_embeddings else 0
        self.cache = TensorCache()

    def forward(self, features: Tensor) -> Tensor:
        """W. `features` (batch, features) of the images are read by adapters only."""
        tensors = None if torch.compiler.is_compiling() else static_tensors(self.clip)
        return self.means() if tensors is None else self.cache.get(self.means, [self.ids, *tensors])

    def means(self) -> Tensor:
        """W, without the cache."""
        return self.encode(self.ids.flatten(0, 1)).unflatten(0, self.ids.shape[:2]).mean(1)

    @property
    def alone(self) -> bool:
        """True if at most one forward hook acts on W."""
        return len(self._forward_hooks) < 2

    def clear_cache(self) -> None:
        """Drops the cached W; the next forward pass computes it."""
        self.cache.clear()

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (…, width) of ids."""
        embeddings: Tensor = text_tower(self.clip).token_embedding(ids)
        return embeddings

    def bare(self, ids: Tensor) -> Tensor:
        """Token embeddings of ids without the adapters on the embedding table."""
        return base_tensor(text_tower(self.clip), "token_embedding", "weight")[ids]

    @property
    def table(self) -> Tensor:
        """The token embeddings (ids, width) of all ids, with the adapters on them, if `encode` accepts token embeddings."""
        module = text_tower(self.clip).token_embedding
        weight: Tensor = module.weight
        if not module._forward_hooks:
            return weight
        rows: Tensor = module(torch.arange(len(weight), device=weight.device))
        return rows

    @property
    def layers(self) -> int:
        """Blocks of the text tower, if `encode` accepts token embeddings."""
        return len(text_tower(self.clip).transformer.resblocks)

    def encode(self, ids: Tensor, embeddings: Tensor | None = None, between: Between | None = None, norm: bool = True) -> Tensor:
        """Features (n, features) of prompts, normalized unless `norm` is False.

        Args:
            ids: (n, length). `embeddings`: (n, length, width), used instead of the token embeddings of `ids`.
            between: changes the input (n, length, width) of each block after the first, whose index it gets; needs `embeddings`.
        """
        exporting = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
        if exporting:  # the number of chunks would make the batch size a constant of the graph
            features = _encode(self.clip, ids, embeddings, between)
            return normalize(features, dim=-1) if norm else features
        parts = ids.split(PROMPTS)
        replaced = [None] * len(parts) if embeddings is None else embeddings.split(PROMPTS)
        pairs = zip(parts, replaced, strict=True)
        features = torch.cat([_encode(self.clip, i, e, between) for i, e in pairs])
        return normalize(features, dim=-1) if norm else features


def text_tower(clip: Any) -> Any:
    """The module that holds the text tower: the model's `text`, or the model itself."""
    return getattr(clip, "text", clip)


def can_encode_embeddings(clip: Any) -> bool:
    """True for text towers that `_encode` can run from token embeddings: those of CLIP, pooled at the end token."""
    tower, pool = text_tower(clip), _pool(clip)
    plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "use_pad_mask", False)
    return hasattr(tower, "token_embedding") and plain and pool in ("argmax", "eos")


def _pool(clip: Any) -> str | None:
    return getattr(text_tower(clip), "text_pool_type" if text_tower(clip) is clip else "pool_type", None)


def _encode(clip: Any, ids: Tensor, embeddings: Tensor | None, between: Between | None) -> Tensor:
    if embeddings is None:
        features = clip.encode_text(ids)
        return features[0] if isinstance(features, tuple) else features
    tower = text_tower(clip)
    dtype = tower.transformer.get_cast_dtype()
    x = embeddings.to(dtype) + tower.positional_embedding[: embeddings.shape[1]].to(dtype)
    x = tower.ln_final(_blocks(tower.transformer, x, tower.attn_mask, between))
    x = x[torch.arange(x.shape[0], device=x.device), _ends(clip, tower, ids)]
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _blocks(transformer: Any, x: Tensor, mask: Tensor | None, between: Between | None) -> Tensor:
    """The blocks of a text tower, with a change of the sequence between them."""
    if between is None:
        output: Tensor = transformer(x, attn_mask=mask)
        return output
    for index, block in enumerate(transformer.resblocks):
        x = between(index, x) if index else x
        call = partial(checkpoint, block, use_reentrant=False) if transformer.grad_checkpointing else block
        x = call(x if transformer.batch_first else x.transpose(0, 1), attn_mask=mask)
        x = x if transformer.batch_first else x.transpose(0, 1)
    return x


def _ends(clip: Any, tower: Any, ids: Tensor) -> Tensor:
    """Positions of the end tokens; for argmax pooling the end token has the largest id."""
    if _pool(clip) == "argmax":
        return ids.argmax(-1)
    return (ids == (tower.text_eos_id if tower is clip else tower.eos_id)).int().argmax(-1)


def static_tensors(clip: nn.Module) -> list[Tensor] | None:
    """Tensors of the text tower, or None if it has hooks, parametrizations, active dropout or trainable tensors."""
    modules = [clip, *(m for name, child in clip.named_children() if name != "visual" for m in child.modules())]
    if any(map(_is_modified, modules)):
        return None
    tensors = [t for m in modules for t in _own(m)]
    if any(t.is_meta or t.is_inference() for t in tensors):
        return None
    return None if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) else tensors


def _is_modified(module: nn.Module) -> bool:
    drops = isinstance(module, nn.Dropout) and module.training and module.p > 0
    return bool(module._forward_hooks or module._forward_pre_hooks or "parametrizations" in module._modules or drops)


def _own(module: nn.Module) -> Iterator[Tensor]:
    """Direct parameters and buffers of a module, without the logit scale and bias, which do not affect W."""
    for name, t in (*module._parameters.items(), *module._buffers.items()):
        if t is not None and not name.startswith("logit_"):
            yield t


class TensorCache:
    """Caches a tensor until the tensors it was computed from change."""

    def __init__(self) -> None:
        self.clear()

    def __deepcopy__(self, memo: Any) -> TensorCache:
        """An empty cache, because the copy's tensors are different ones."""
        return TensorCache()

    def clear(self) -> None:
        """Empties the cache."""
        self.value: Tensor | None = None
        self.sources: list[Tensor] = []
        self.state: Any = None

    def get(self, compute: Callable[[], Tensor], sources: Sequence[Tensor]) -> Tensor:
        """The result of `compute()`, without gradients, cached while `sources` are unchanged."""
        state = [_autocast_state(sources[0].device.type), *((t.data_ptr(), t._version, t.dtype, t.device) for t in sources)]
        if self.value is None or state != self.state:
            with torch.inference_mode(False), torch.no_grad():
                self.value = compute()
            # references keep the storage alive, so that no other tensor reuses a data pointer
            self.state, self.sources = state, [t.detach() for t in sources]
        return self.value


def _autocast_state(device: str) -> tuple[Any, ...]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
