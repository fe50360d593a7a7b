"""What a text tower makes of the names of classes, computed once as long as nothing of it can have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from veneer.injection.seams.adapter_calls import base_tensor

from .tokenizer import TextError, Words

PROMPTS = 1024
"""Prompts that go through the text tower at a time."""


class ClassTexts(nn.Module):
    """Class weights W (classes, features): for each class the mean over templates of its normalised text features.

    They are kept while the text tower is bare and frozen, and computed anew in each pass, with a graph where one is wanted, while
    there is a hook or a parametrised tensor in it or something of it is trained. A change of its tensors is seen by their version
    and place. Only what is written past both, in place through `.data`, is not: call `forget()` then.

    Args:
        clip: the model, which is not made a child of this one. `names`, `templates`: of the classes, `{}` for the name.
        words: its tokenizer.

    Attributes:
        takes_rows: True if `encode` can be given rows, of `width`.
    Raises:
        TextError: a template without `{}`, or texts too long for the tower.
    """

    clip: nn.Module
    ids: Tensor

    def __init__(self, clip: nn.Module, names: Sequence[str], templates: Sequence[str], words: Words) -> None:
        super().__init__()
        wrong = [t for t in templates if "{}" not in t]
        if wrong or not templates or not names:
            raise TextError(
                f"templates have {{}} in the place of the name, and there is a class; got {wrong or (templates, names)}.",
                where="templates",
                given=tuple(wrong),
            )
        self.__dict__["clip"] = clip  # past torch's own way, which would make it a child
        self.names, self.words = tuple(name.replace("_", " ") for name in names), words
        texts = [template.replace("{}", name) for name in self.names for template in templates]
        self.register_buffer("ids", words.ids(texts).unflatten(0, (len(names), -1)), persistent=False)
        self.takes_rows = reads_rows(clip) and words.brackets
        self.width = int(text_tower(clip).token_embedding.embedding_dim) if self.takes_rows else 0
        self.kept = Kept()

    def forward(self, features: Tensor) -> Tensor:
        """W. `features`: of the pictures (batch, features), which only adapters read."""
        tensors = None if torch.compiler.is_compiling() else still(self.clip)
        return self.means() if tensors is None else self.kept.get(self.means, [self.ids, *tensors])

    def means(self) -> Tensor:
        """W, computed."""
        return self.encode(self.ids.flatten(0, 1)).unflatten(0, self.ids.shape[:2]).mean(1)

    @property
    def alone(self) -> bool:
        """True if no more than one hook acts on W, which is then given W as it is computed here."""
        return len(self._forward_hooks) < 2

    def forget(self) -> None:
        """Compute the class weights anew in the next pass."""
        self.kept.clear()

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of ids, as the tower's table gives them: (…, width)."""
        rows: Tensor = text_tower(self.clip).token_embedding(ids)
        return rows

    def bare(self, ids: Tensor) -> Tensor:
        """The same without what is attached to the table."""
        return base_tensor(text_tower(self.clip), "token_embedding", "weight")[ids]

    def encode(self, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """Normalised features (n, features) of prompts.

        Args:
            ids: (n, length). `rows`: (n, length, width), in the place of the rows that the table has for them.
        """
        parts = ids.split(PROMPTS)
        given = [None] * len(parts) if rows is None else rows.split(PROMPTS)
        return torch.cat([normalize(_encode(self.clip, i, r), dim=-1) for i, r in zip(parts, given, strict=True)])


def text_tower(clip: Any) -> Any:
    """The module that holds the text tower: the model's `text`, or the model itself."""
    return getattr(clip, "text", clip)


def reads_rows(clip: Any) -> bool:
    """True for text towers whose pass from rows on is known: those of CLIP, which end at a token of the prompt."""
    tower, pool = text_tower(clip), _pool(clip)
    plain = getattr(tower, "cls_emb", None) is None and not getattr(tower, "use_pad_mask", False)
    return hasattr(tower, "token_embedding") and plain and pool in ("argmax", "eos")


def _pool(clip: Any) -> str | None:
    return getattr(text_tower(clip), "text_pool_type" if text_tower(clip) is clip else "pool_type", None)


def _encode(clip: Any, ids: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        features = clip.encode_text(ids)
        return features[0] if isinstance(features, tuple) else features
    tower = text_tower(clip)
    dtype = tower.transformer.get_cast_dtype()
    x = rows.to(dtype) + tower.positional_embedding[: rows.shape[1]].to(dtype)
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
    x = x[torch.arange(len(x), device=x.device), _ends(clip, tower, ids)]
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _ends(clip: Any, tower: Any, ids: Tensor) -> Tensor:
    """Where prompts end: at the end token, which CLIP knows by its being the largest id."""
    if _pool(clip) == "argmax":
        return ids.argmax(-1)
    return (ids == (tower.text_eos_id if tower is clip else tower.eos_id)).int().argmax(-1)


def still(clip: nn.Module) -> list[Tensor] | None:
    """The tensors that the text tower computes with, or None where something acts on it, or is trained."""
    modules = [clip, *(m for name, child in clip.named_children() if name != "visual" for m in child.modules())]
    if any(map(_acted_on, modules)):
        return None
    tensors = [t for m in modules for t in _own(m)]
    if any(t.is_meta or t.is_inference() for t in tensors):
        return None
    return None if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) else tensors


def _acted_on(module: nn.Module) -> bool:
    drops = isinstance(module, nn.Dropout) and module.training and module.p > 0
    return bool(module._forward_hooks or module._forward_pre_hooks or "parametrizations" in module._modules or drops)


def _own(module: nn.Module) -> Iterator[Tensor]:
    """A module's own tensors, without the scale and bias of the logits, which are used in each pass."""
    for name, t in (*module._parameters.items(), *module._buffers.items()):
        if t is not None and not name.startswith("logit_"):
            yield t


class Kept:
    """A tensor, for as long as those that it was computed from are what they were."""

    def __init__(self) -> None:
        self.clear()

    def __deepcopy__(self, memo: Any) -> Kept:
        """An empty one: a copy has tensors of its own."""
        return Kept()

    def clear(self) -> None:
        """Keep nothing."""
        self.value: Tensor | None = None
        self.sources: list[Tensor] = []
        self.facts: Any = None

    def get(self, compute: Callable[[], Tensor], sources: Sequence[Tensor]) -> Tensor:
        """What `compute()` gives without a graph, or gave."""
        facts = [_facts(sources[0].device.type), *((t.data_ptr(), t._version, t.dtype, t.device) for t in sources)]
        if self.value is None or facts != self.facts:
            with torch.inference_mode(False), torch.no_grad():
                self.value = compute()
            # they are held as they were, so that no other tensor can come to lie in their place
            self.facts, self.sources = facts, [t.detach() for t in sources]
        return self.value


def _facts(device: str) -> tuple[Any, ...]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
