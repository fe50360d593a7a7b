"""(IA)³, VeRA and GLoRA in peft's format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from veneer.injection import Attachment
from veneer.injection.adapter_forms import InputAdapter
from veneer.injection.sites import WeightSite

from .._lycoris.codec import SiteTensors
from .codec import PeftAdapter, PeftCodec, PeftModule, Settings, shared_value
from .config import MOST, check_pattern


class IA3Peft(PeftCodec):
    """`ia3_l`: (d_out, 1), output multipliers, or (1, d_in) of a feed-forward layer, input multipliers. l = 1 + veneer's delta.

    peft multiplies the bias with the output, veneer does not: output scaling of layers with a bias is rejected.
    """

    kind: ClassVar[str] = "IA3"
    method: ClassVar[str] = "ia3"
    suffixes: ClassVar[tuple[str, ...]] = ("ia3_l",)

    def read(self, layer: PeftModule) -> list[SiteTensors]:
        vector, site = layer.parts["ia3_l"], layer.site
        if site.groups != 1:
            raise layer.error(f"is a convolution with {site.groups} groups, for which peft has no (IA)³")
        try:
            inputs = _is_feed_forward(layer.config.get("feedforward_modules"), layer.path)
        except ValueError as error:
            raise layer.error(f"has a config with invalid feedforward_modules ({error})") from error
        layer.expect(vector.numel() == (site.d_in if inputs else site.d_out), f"{site.d_in if inputs else site.d_out} elements")
        if not inputs and layer.biases:
            why = "has a bias, which peft's (IA)³ scales with the output, but veneer's does not"
            raise layer.error(why, given="bias")
        return [SiteTensors(site, {"inputs": ("*",) if inputs else ()}, {"delta": vector.flatten() - 1})]

    def config(self, pieces: Sequence[SiteTensors]) -> Settings:
        """Options by role if all sites of a role agree, else by site."""
        found = super().config(pieces)
        roles = {p.site.role for p in pieces if p.options["inputs"]}
        clear = all(bool(p.options["inputs"]) == (p.site.role in roles) for p in pieces)
        return {"inputs": tuple(sorted(roles))} if clear else found

    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        value, inputs = 1 + part.adapter.delta.detach(), _scales_input(part)
        bias = getattr(part.towers[part.site.component].get_submodule(part.site.path), "bias", None)
        if not inputs and bias is not None:
            why = "has a bias, which peft's (IA)³ scales with the output, but veneer's does not"
            raise part.error(why, given="bias")
        if part.site.groups != 1:
            raise part.error(f"is a convolution with {part.site.groups} groups, for which peft has no (IA)³")
        ones = (1,) * len(part.site.kernel)
        return {"ia3_l": value.view(1, -1, *ones) if inputs else value.view(*((1, -1) if ones else (-1, 1)), *ones)}

    def settings(self, attachment: Attachment, parts: Sequence[PeftAdapter]) -> Settings:
        return {"feedforward_modules": [p.path for p in parts if _scales_input(p)], "fan_in_fan_out": False}


class VeRAPeft(PeftCodec):
    """`vera_lambda_b` (d_out), `vera_lambda_d` (r), and once `vera_A` (r, widest input), `vera_B` (widest output, r)."""

    kind: ClassVar[str] = "VERA"
    method: ClassVar[str] = "vera"
    suffixes: ClassVar[tuple[str, ...]] = ("vera_lambda_b", "vera_lambda_d")
    shared: ClassVar[tuple[str, ...]] = ("base_model.vera_A", "base_model.vera_B")

    def rank(self, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
        return (shapes.get("vera_lambda_d") or (None,))[0]

    def read(self, layer: PeftModule) -> list[SiteTensors]:
        b, d = (layer.parts.get(end) for end in self.suffixes)
        if set(self.shared) - layer.shared.keys():
            raise layer.error(
                "belongs to a VeRA whose random matrices are not in the file (save_projection=False), and regenerating them from "
                "the seed depends on the machine. Save it with save_projection=True",
                missing=sorted(set(self.shared) - layer.shared.keys()),
                option="save_projection",
            )
        A, B = (layer.shared[key] for key in self.shared)
        site = layer.site
        layer.expect(A.ndim == B.ndim == 2, "two-dimensional vera_A and vera_B")
        rank = len(A)
        right = b is not None and d is not None and b.shape == (site.d_out,) and d.shape == (rank,) and B.shape[1:] == (rank,)
        layer.expect(right and A.shape[1] >= site.d_in and len(B) >= site.d_out and not site.kernel, "b, d, A and B of one rank")
        assert b is not None and d is not None  # noqa: PT018
        return [SiteTensors(site, {"rank": rank}, {"b": b, "d": d, "shared.A": A, "shared.B": B})]

    def config(self, pieces: Sequence[SiteTensors]) -> Settings:
        """Crops A and B to the dimensions that these sites need, as veneer's vera stores them."""
        widest, tallest = max(p.site.d_in for p in pieces), max(p.site.d_out for p in pieces)
        for piece in pieces:
            state: Any = piece.state
            state["shared.A"], state["shared.B"] = state["shared.A"][:, :widest], state["shared.B"][:tallest]
        return super().config(pieces)

    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        if part.site.kernel:
            raise part.error("is a convolution, for which peft has no VeRA")
        return {"vera_lambda_b": part.adapter.b.detach(), "vera_lambda_d": part.adapter.d.detach()}

    def whole(self, attachment: Attachment) -> dict[str, Tensor]:
        (_, adapter), *_ = attachment.parts.values()
        shared: Any = adapter.get_submodule("shared")
        return dict(zip(self.shared, (shared.A, shared.B), strict=True))

    def settings(self, attachment: Attachment, parts: Sequence[PeftAdapter]) -> Settings:
        method: Any = attachment.method
        rank = shared_value(parts, "rank", {p.path: len(p.adapter.d) for p in parts})
        plain = {"save_projection": True, "projection_prng_key": 0, "vera_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}
        return {"r": rank, "d_initial": method.d_initial, **plain}


FORMS = {"lora": "low_rank", "vector": "vector", "constant": "scalar", "none": "none"}


class GLoRAPeft(PeftCodec):
    """`glora_A`, `glora_B` (`.Xd` (d_out, r) times `.Xu` (r, d_in), or `.X`), `glora_D`, `glora_E` (`.X` (d_out) or a scalar).

    W' = W + W ∘ A + B, b' = b + b ∘ D + E. `glora_C`, which adds W C to the bias, is rejected.
    """

    kind: ClassVar[str] = "GLORA"
    method: ClassVar[str] = "glora"
    suffixes: ClassVar[tuple[str, ...]] = tuple(f"glora_{t}.{x}" for t in "ABCDE" for x in ("Xd", "Xu", "X", "zeros"))

    def read(self, layer: PeftModule) -> list[SiteTensors]:
        forms = [FORMS.get(str(layer.config.get(key)), "") for key in ("config_A_B", "config_D_E")]
        layer.expect("" not in forms, "config_A_B and config_D_E of known forms")
        if any(end.startswith("glora_C") and t.any() for end, t in layer.parts.items()):
            raise layer.error("has a term C, which adds W C to the bias; veneer's glora has no such term", given="C")
        wide, narrow = (_terms(layer, letters) for letters in ("AB", "DE"))
        rank = {"rank": wide["scale.down"].shape[0]} if "scale.down" in wide else {}
        options = {"A": forms[0], "B": forms[0], "D": forms[1], "E": forms[1], **rank}
        pieces = [SiteTensors(layer.site, options, wide)]
        layer.expect(bool(layer.biases) or not narrow, "no bias terms")
        for site in layer.biases if narrow else ():
            rows = slice(*(site.rows or (None,)))
            state = {name: t[rows] if len(t) > 1 else t for name, t in narrow.items()}
            pieces.append(SiteTensors(site, options, state))  # type: ignore[arg-type]
        return pieces

    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        letters = "AB" if isinstance(part.site, WeightSite) else "DE"
        if isinstance(part.site, WeightSite) and part.site.kernel:
            raise part.error("is a convolution, for which peft has no GLoRA")
        found: dict[str, Tensor] = {}
        for letter, term in zip(letters, (part.adapter.scale, part.adapter.shift), strict=True):
            if term.form == "low_rank":
                found |= {f"glora_{letter}.Xd": term.up.detach(), f"glora_{letter}.Xu": term.down.detach()}
            elif term.form != "none":
                flat = term.form == "scalar" or letters == "DE"
                found[f"glora_{letter}.X"] = term.up.detach().flatten() if flat else term.up.detach()
        return found

    def settings(self, attachment: Attachment, parts: Sequence[PeftAdapter]) -> Settings:
        names = {form: name for name, form in FORMS.items()}
        weights = [p for p in parts if isinstance(p.site, WeightSite)]
        alone = [p for p in parts if p.path not in {w.path for w in weights}]
        if alone:
            raise alone[0].error("is a bias whose weight is not adapted, but peft's GLoRA adapts both", expected="weight")
        wide = shared_value(parts, "forms", {p.path: (p.adapter.scale.form, p.adapter.shift.form) for p in weights})
        others = [p for p in parts if p not in weights]
        narrow = (
            shared_value(others, "forms", {p.path: (p.adapter.scale.form, p.adapter.shift.form) for p in others})
            if others
            else ("none",) * 2
        )
        if wide[0] != wide[1] or narrow[0] != narrow[1]:
            why = "has terms of different forms, but peft's GLoRA has one form for A and B, and one for D and E"
            raise parts[0].error(why, given=(wide, narrow))
        if others:
            _check_all_biased(weights, {p.path for p in others})
        ranks = {p.path: p.adapter.scale.down.shape[0] for p in weights if wide[0] == "low_rank"}
        rank = shared_value(parts, "rank", ranks) if ranks else 4
        return {"r": rank, "config_A_B": names[wide[0]], "config_C": "none", "config_D_E": names[narrow[0]]}


def _check_all_biased(weights: Sequence[PeftAdapter], biased: set[str]) -> None:
    for part in weights:
        bias = getattr(part.towers[part.site.component].get_submodule(part.site.path), "bias", None)
        if bias is not None and part.path not in biased:
            why = "has a bias that is not adapted while others are; peft's config has one setting for all"
            raise part.error(why, expected="bias")


def _terms(layer: PeftModule, letters: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for letter, name in zip(letters, ("scale", "shift"), strict=True):
        for end, part in (("Xd", "up"), ("Xu", "down"), ("X", "up")):
            tensor = layer.parts.get(f"glora_{letter}.{end}")
            if tensor is not None:
                found[f"{name}.{part}"] = tensor if tensor.ndim == 2 else tensor.flatten()[:, None]
    return found


def _is_feed_forward(modules: Any, path: str) -> bool:
    """peft's rule: a regular expression for the whole path, or a list of suffixes."""
    if isinstance(modules, str):
        return re.fullmatch(check_pattern(modules), path) is not None
    ends = [] if modules is None else modules
    if not isinstance(ends, list) or len(ends) > MOST or not all(isinstance(end, str) and end for end in ends):
        raise ValueError("neither a pattern nor a list of names")
    return any(path.endswith(end) for end in ends)


def _scales_input(part: PeftAdapter) -> bool:
    return isinstance(part.adapter, InputAdapter)
