"""LoRA, DoRA, LoHa and LoKr in peft's format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.functional.kronecker import kron_factors
from veneer.injection import Attachment
from veneer.injection.adapter_forms import PairAdapter

from .._core.dora_magnitudes import SCALE
from .._core.lora_config import match_shape
from .._core.lora_reader import DOWN, UP
from .._io.reader import File
from .._lycoris.codec import SiteTensors
from .._lycoris.loha import LoHaCodec
from .._lycoris.lokr import LoKrCodec
from .._lycoris.lora import DoRACodec, LoRACodec
from .codec import PeftAdapter, PeftCodec, PeftModule, Settings
from .config import DEFAULT_ALPHA, module_value, patterns, scaled_alpha

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDED = ("lora_embedding_A", "lora_embedding_B")


class LoRAPeft(PeftCodec):
    """`lora_A.weight` (r, d_in[, k, k]) and `lora_B.weight` (d_out, r[, 1, 1]); for embeddings `lora_embedding_A` (r, rows) and
    `lora_embedding_B` (width, r). s = alpha / r, or alpha / √r with `use_rslora`.
    """

    kind: ClassVar[str] = "LORA"
    method: ClassVar[str] = "lora"
    suffixes: ClassVar[tuple[str, ...]] = (A, B, *EMBEDDED)
    codec: ClassVar[LoRACodec] = LoRACodec()

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return next((shapes[end][0] for end in (A, EMBEDDED[0]) if shapes.get(end)), None)

    def read(self, layer: PeftModule) -> list[SiteTensors]:
        if layer.site.kind == "embedding":
            return [_embedding(layer)]
        return [_plain(layer)]

    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        if part.site.kind == "embedding":
            down, up = part.adapter.pair()
            return {EMBEDDED[0]: down.detach().T, EMBEDDED[1]: up.detach()}
        if part.site.groups != 1:
            raise part.error(f"is a convolution with {part.site.groups} groups, for which peft uses another low-rank form")
        found = self.codec.write(part.group())
        return {A: found[DOWN], B: found[UP]}

    def config(self, pieces: Sequence[SiteTensors]) -> Settings:
        return self.codec.config(pieces)

    def settings(self, attachment: Attachment, parts: Sequence[PeftAdapter]) -> Settings:
        ranks = {p.path: _rank(p) for p in parts}
        rank, others = patterns(ranks)
        alpha, alphas = patterns({p.path: p.adapter.scaling * ranks[p.path] for p in parts})
        plain = {"bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": False, "use_rslora": False}
        return {"r": rank, "lora_alpha": alpha, "rank_pattern": others, "alpha_pattern": alphas, "use_dora": False, **plain}


class DoRAPeft(LoRAPeft):
    """LoRA and `lora_magnitude_vector` m, (d_out) or (1, d_out, 1, 1): W' = m·(W + s·B A) / ‖W + s·B A‖ per output."""

    method: ClassVar[str] = "dora"
    suffixes: ClassVar[tuple[str, ...]] = (A, B, MAGNITUDE, f"{MAGNITUDE}.weight")
    codec: ClassVar[LoRACodec] = DoRACodec()

    def read(self, layer: PeftModule) -> list[SiteTensors]:
        m = layer.parts.get(MAGNITUDE, layer.parts.get(f"{MAGNITUDE}.weight"))
        if m is None or layer.site.kind == "embedding":
            raise layer.error(
                "has no magnitudes, but the file is DoRA" if m is None else "is an embedding, which dora does not support"
            )
        one = (MAGNITUDE in layer.parts) != (f"{MAGNITUDE}.weight" in layer.parts)
        layer.expect(one and m.numel() == layer.site.d_out, f"one {MAGNITUDE} ({layer.site.d_out})")
        return self.codec.read(
            layer.as_module({**lycoris_tensors(layer), "dora_scale": m.reshape(-1, *(1,) * len(layer.site.weight_shape[1:]))})
        )

    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        if part.site.groups != 1:
            raise part.error(f"is a convolution with {part.site.groups} groups, for which peft uses another low-rank form")
        if part.adapter.norm_axis != "output":
            why = "has norm_axis='input', but peft's DoRA takes the norm per output: a different function"
            raise part.error(why, given={"norm_axis": "input"}, expected="output")
        found = self.codec.write(part.group())
        m = found["dora_scale"].flatten()
        return {A: found[DOWN], B: found[UP], MAGNITUDE: m.view(1, -1, *(1,) * len(part.site.kernel)) if part.site.kernel else m}

    def settings(self, attachment: Attachment, parts: Sequence[PeftAdapter]) -> Settings:
        return {**super().settings(attachment, parts), "use_dora": True}


class AdaLoRAPeft(LoRAPeft):
    """`lora_A` (r, d_in), `lora_B` (d_out, r) and the singular values `lora_E` (r, 1); ΔW = alpha / (init_r + 1e-5)·B (A ∘ E).

    r is the rank after pruning, while the scale uses the config's `init_r`. An alpha of 0 or less means `init_r`.
    Loaded as a lora attachment with A ∘ E as `down`. Read only.
    Source: peft 0.21 `tuners/adalora/layer.py`, `tuners/adalora/model.py`.
    """

    kind: ClassVar[str] = "ADALORA"
    suffixes: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E")

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return (shapes.get("lora_A") or (None,))[0]

    def alpha(self, file: File, config: Settings, path: str, rank: int) -> float:
        initial = module_value(file, config, path, "init_r", "init_r_pattern", 12)
        alpha = module_value(file, config, path, "lora_alpha", "lora_alpha_pattern", DEFAULT_ALPHA)
        return (alpha if alpha > 0 else initial) / (initial + 1e-5) * rank

    def read(self, layer: PeftModule) -> list[SiteTensors]:
        down, up, values = (layer.parts.get(end) for end in self.suffixes)
        site = layer.site
        if site.kind == "embedding" or site.groups != 1:
            raise layer.error("is an embedding or a grouped convolution, for which peft has no AdaLoRA")
        rank = len(down) if down is not None and down.ndim == 2 else 0
        shapes = [None if t is None else tuple(t.shape) for t in (down, up, values)]
        width = math.prod(site.weight_shape[1:])
        whole = shapes == [(rank, width), (site.d_out, rank), (rank, 1)]
        layer.expect(whole, "lora_A (r, d_in), lora_B (d_out, r) and lora_E (r, 1)")
        initial = module_value(layer.file, layer.config, layer.path, "init_r", "init_r_pattern", 12)
        layer.expect(initial >= max(rank, 1), f"an init_r of at least {max(rank, 1)} in the config, not {initial:g}")
        if not rank:
            layer.notes.append(f"every singular value of '{layer.path}' was pruned")
            return []
        assert down is not None and up is not None and values is not None  # noqa: PT018
        low = (down.double() * values.double()).reshape(rank, *site.weight_shape[1:])
        state = {"down": low.float(), "up": up.reshape(site.d_out, rank, *(1,) * len(site.kernel))}
        return [SiteTensors(site, {"rank": rank, "alpha": self.alpha(layer.file, dict(layer.config), layer.path, rank)}, state)]

    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        raise part.error("is lora, which is written as LORA")


class LoHaPeft(PeftCodec):
    """The tensors of the LyCORIS format; s = alpha / r from the config."""

    kind: ClassVar[str] = "LOHA"
    method: ClassVar[str] = "loha"
    codec: ClassVar[LoHaCodec] = LoHaCodec()
    suffixes: ClassVar[tuple[str, ...]] = tuple(end for end in codec.suffixes if end != SCALE)

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return self.codec.rank(shapes)

    def read(self, layer: PeftModule) -> list[SiteTensors]:
        down = layer.parts.get("hada_w1_b")
        layer.expect(down is not None and down.ndim > 1 and len(down) > 0, "all of its factors")
        assert down is not None
        rank, alpha = len(down), module_value(layer.file, layer.config, layer.path, "alpha", "alpha_pattern", DEFAULT_ALPHA)
        parts = dict(layer.parts)
        if alpha == 0 and "hada_w1_a" in parts:
            parts["hada_w1_a"], alpha = torch.zeros_like(parts["hada_w1_a"]), float(rank)
        return self.codec.read(layer.as_module({**parts, "alpha": torch.tensor(alpha, dtype=torch.float64)}))

    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        _reject_magnitudes(part, "LoHa")
        found = self.codec.write(part.group())
        if part.adapter.core1 is None and len(part.site.kernel) == 2 and max(part.site.kernel) > 1:
            found = {k: t.flatten(1) if t.ndim > 2 else t for k, t in found.items()}
        found.pop("alpha")
        return found

    def settings(self, attachment: Attachment, parts: Sequence[PeftAdapter]) -> Settings:
        ranks = {p.path: p.adapter.up1.shape[1] for p in parts}
        rank, others = patterns(ranks)
        alpha, alphas = patterns({p.path: (p.adapter.scaling or 1.0) * ranks[p.path] for p in parts})
        large = {p.path: p.adapter.core1 is not None for p in parts if max(p.site.kernel, default=1) > 1}
        tucker = len(set(large.values())) == 1 and next(iter(large.values()))
        if len(set(large.values())) > 1:
            raise parts[0].error("and others differ in having a Tucker core, but peft's config has a single setting")
        return {
            "r": rank, "alpha": alpha, "rank_pattern": others, "alpha_pattern": alphas, "use_effective_conv2d": tucker,
            "rank_dropout": 0.0, "module_dropout": 0.0,
        }  # fmt: skip


class LoKrPeft(PeftCodec):
    """The tensors of the LyCORIS format; s = alpha / r from the config, also if both factors are full."""

    kind: ClassVar[str] = "LOKR"
    method: ClassVar[str] = "lokr"
    codec: ClassVar[LoKrCodec] = LoKrCodec()
    suffixes: ClassVar[tuple[str, ...]] = tuple(end for end in codec.suffixes if end != SCALE)

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return self.codec.rank(shapes)

    def read(self, layer: PeftModule) -> list[SiteTensors]:
        rank = module_value(layer.file, layer.config, layer.path, "r", "rank_pattern", 8)
        layer.expect(rank >= 1, f"a rank r of 1 or more in the config, not {rank:g}")
        scale = module_value(layer.file, layer.config, layer.path, "alpha", "alpha_pattern", DEFAULT_ALPHA) / rank
        first = ("lokr_w1", "lokr_w1_a")
        parts = {end: t.double() * scale if end in first and scale != 1 else t for end, t in layer.parts.items()}
        return self.codec.read(layer.as_module(parts))

    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        if part.site.groups != 1:
            raise part.error(f"is a convolution with {part.site.groups} groups, which is not supported in peft's format")
        _reject_magnitudes(part, "LoKr")
        found = self.codec.write(part.group())
        found.pop("alpha", None)
        return found

    def config(self, pieces: Sequence[SiteTensors]) -> Settings:
        return self.codec.config(pieces)

    def settings(self, attachment: Attachment, parts: Sequence[PeftAdapter]) -> Settings:
        """The factor and ranks from which peft builds factors of the same shapes."""
        method: Any = attachment.method
        splits = {p.path: p.adapter.split for p in parts}
        low = {path: s.left_rank or s.right_rank for path, s in splits.items()}
        ranks = {path: r or max(splits[path].vp, splits[path].vq) for path, r in low.items()}  # large enough for full factors
        both = any(s.left_rank for s in splits.values())
        for part in parts:
            split = splits[part.path]
            sides = [kron_factors(n, method.factor) for n in (part.site.d_out, part.site.d_in // part.site.groups)]
            rank = ranks[part.path]
            left = both and rank < max(split.up, split.uq) / 2
            right = rank < max(split.vp, split.vq) / 2
            if sides != [(split.up, split.vp), (split.uq, split.vq)] or (left, right) != (
                bool(split.left_rank),
                bool(split.right_rank),
            ):
                raise part.error(f"has factors that peft does not build with factor {method.factor} and rank {rank}")
        rank, others = patterns(ranks)
        alpha, alphas = patterns({p.path: ranks[p.path] * (p.adapter.scaling if low[p.path] else 1.0) for p in parts})
        return {
            "r": rank, "alpha": alpha, "rank_pattern": others, "alpha_pattern": alphas, "decompose_factor": method.factor,
            "decompose_both": both, "use_effective_conv2d": False, "rank_dropout": 0.0, "module_dropout": 0.0,
        }  # fmt: skip


def _reject_magnitudes(part: PeftAdapter, what: str) -> None:
    """Raises for DoRA magnitudes, which peft's format cannot hold."""
    if part.adapter.norm_axis is not None:
        axis = part.adapter.norm_axis
        raise part.error(f"has magnitudes (norm_axis={axis!r}), which peft's {what} does not have", given={"norm_axis": axis})


def lycoris_tensors(layer: PeftModule) -> dict[str, Tensor]:
    """LoRA's tensors in the LyCORIS format. An alpha of 0 (no update) is written as B = 0."""
    down, up = layer.parts.get(A), layer.parts.get(B)
    if down is None or up is None or down.ndim < 2:
        raise layer.error(f"has no complete factors, only {', '.join(layer.parts)}", given=tuple(layer.parts), expected=(A, B))
    rank = down.shape[0]
    alpha = scaled_alpha(layer.file, layer.config, layer.path, rank)
    if alpha == 0:
        up, alpha = torch.zeros_like(up), float(rank)
    return {DOWN: down, UP: up, "alpha": torch.tensor(alpha, dtype=torch.float64)}


def _plain(layer: PeftModule) -> SiteTensors:
    """LoRA as stored; `load_state` reports missing and misshapen tensors of all modules together."""
    site, down, up = layer.site, layer.parts.get(A), layer.parts.get(B)
    rank = down.shape[0] if down is not None and down.ndim else up.shape[1] if up is not None and up.ndim > 1 else 0
    layer.expect(rank > 0, "lora_A and lora_B of the same rank")
    alpha = scaled_alpha(layer.file, layer.config, layer.path, rank)
    state = {} if down is None else {"down": match_shape(down, (rank, *site.weight_shape[1:]))}
    state |= {} if up is None else {"up": match_shape(up, (site.d_out, rank, *(1,) * len(site.kernel)))}
    return SiteTensors(site, {"rank": rank, "alpha": alpha}, state)


def _embedding(layer: PeftModule) -> SiteTensors:
    down, up = (layer.parts.get(end) for end in EMBEDDED)
    rows, width = layer.site.weight_shape
    rank = len(down) if down is not None and down.ndim == 2 else 0
    right = down is not None and up is not None and down.shape == (rank, rows) and up.shape == (width, rank)
    layer.expect(right and rank > 0, f"{EMBEDDED[0]} (r, {rows}) and {EMBEDDED[1]} ({width}, r)")
    assert down is not None and up is not None  # noqa: PT018
    alpha = scaled_alpha(layer.file, layer.config, layer.path, rank)
    return SiteTensors(layer.site, {"rank": rank, "alpha": alpha}, {"down": down.T, "up": up})


def _rank(part: PeftAdapter) -> int:
    down, _ = part.adapter.pair() if isinstance(part.adapter, PairAdapter) else (part.adapter.down, part.adapter.up)
    return int(down.shape[1 if part.site.kind == "embedding" else 0])
