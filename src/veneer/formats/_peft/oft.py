"""OFT and BOFT in peft's layout: what turns the inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from veneer.functional.cayley import skew
from veneer.injection import Attachment

from .._lycoris.codec import Piece
from .codec import Layer, Part, PeftCodec, Settings, same
from .config import of, switched

SWITCHES, MOST_TERMS = ("block_share", "coft", "use_cayley_neumann"), 1_000


class OFTPeft(PeftCodec):
    """`oft_R.weight` (n, b(b−1)/2), the entries of Q above the diagonal; W' = W Rᵀ, R = (I − Q)(I + Q)⁻¹, so Q is minus veneer's.

    With `use_cayley_neumann`, peft's default, R is a truncated series in +Q: oft's `neumann_terms`. `coft` shortens each Q to
    eps / √n.
    """

    kind: ClassVar[str] = "OFT"
    method: ClassVar[str] = "oft"
    ends: ClassVar[tuple[str, ...]] = ("oft_R.weight", "oft_R")

    def read(self, layer: Layer) -> list[Piece]:
        layer.expect(len(layer.parts) == 1, "one oft_R")
        given = next(iter(layer.parts.values()))
        width = layer.site.d_in
        _plain(layer, "OFT")
        size = round((1 + math.sqrt(1 + 8 * given.shape[1])) / 2) if given.ndim == 2 else 0
        share, shortened, series = (switched(layer.file, layer.config, key) for key in SWITCHES)
        count = 1 if share else width // max(size, 1)
        right = size > 1 and given.shape == (count, size * (size - 1) // 2) and width % size == 0
        layer.expect(right, f"oft_R (n, b(b−1)/2) with n·b = {width}")
        coft = of(layer.file, layer.config, layer.path, "eps", "eps_pattern", 6e-5) if shortened else None
        layer.expect(coft is None or coft > 0, "an eps above 0 in the config")
        terms = of(layer.file, layer.config, layer.path, "num_cayley_neumann_terms", "terms_pattern", 5) if series else None
        right, name = terms is None or terms in range(1, MOST_TERMS), "num_cayley_neumann_terms"
        layer.expect(right, f"from 1 to {MOST_TERMS} {name}", option=name, given=terms)
        if terms is not None and terms > 2 and "peft_version" not in layer.config and not layer.notes:
            layer.notes.append("no peft_version: read as peft 0.18 and later, which count the series' last power once, not twice")
        options = {"block_size": size, "share": share, "coft": None if coft is None else coft / size**2, "rescale": False}
        options["neumann_terms"] = None if terms is None else int(terms)
        return [Piece(layer.site, options, {"skew": given if series else -given})]

    def write(self, part: Part) -> dict[str, Tensor]:
        if getattr(part.adapter, "site", None) is not None:
            raise part.refuse("turns its outputs, and peft's OFT its inputs: another function", given="output", expected="input")
        if part.adapter.magnitude is not None:
            raise part.refuse("has lengths of its own (rescale), which peft's OFT has not", given={"rescale": True})
        _only_pixels(part, "OFT")
        entries = part.adapter.skew.detach()
        return {"oft_R.weight": -entries if part.adapter.terms is None else entries}

    def settings(self, attachment: Attachment, parts: Sequence[Part]) -> Settings:
        size = same(parts, "blocks of", {p.path: p.adapter.size for p in parts})
        coft = same(parts, "coft", {p.path: p.adapter.radius and attachment.method.at(p.site).coft for p in parts})  # type: ignore[attr-defined]
        share = same(parts, "share", {p.path: len(p.adapter.skew) * size != p.site.d_in for p in parts})
        terms = same(parts, "neumann_terms", {p.path: p.adapter.terms for p in parts})
        series = {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
        return {
            "r": 0, "oft_block_size": size, **series, "coft": coft is not None, "block_share": share,
            "eps": 6e-5 if coft is None else coft * size**2, "bias": "none", "module_dropout": 0.0, "fan_in_fan_out": False,
        }  # fmt: skip


class BOFTPeft(PeftCodec):
    """`boft_R` (m, n, b, b), Q its skew part, and `boft_s` (d_out, 1), lengths; W' = D W Rᵀ, each block (I − Q)(I + Q)⁻¹.

    peft builds more than one component only where its CUDA extension is compiled.
    """

    kind: ClassVar[str] = "BOFT"
    method: ClassVar[str] = "boft"
    ends: ClassVar[tuple[str, ...]] = ("boft_R", "boft_s")

    def read(self, layer: Layer) -> list[Piece]:
        given, lengths, width = layer.parts.get("boft_R"), layer.parts.get("boft_s"), layer.site.d_in
        _plain(layer, "BOFT")
        side = given.shape[-1] if given is not None and given.ndim == 4 else 0
        right = given is not None and side > 1 and given.shape[1:] == (width // side, side, side) and width % side == 0
        layer.expect(
            right and (lengths is None or lengths.numel() == layer.site.d_out), f"boft_R (m, n, b, b) with n·b = {width}"
        )
        assert given is not None
        q = -0.5 * (given - given.mT)
        state = {"skew": _entries(q)} | ({} if lengths is None else {"magnitude": lengths.flatten()})
        return [Piece(layer.site, {"m": len(given), "b": side, "rescale": lengths is not None}, state)]

    def write(self, part: Part) -> dict[str, Tensor]:
        adapter = part.adapter
        if getattr(adapter, "site", None) is not None:
            raise part.refuse("turns its outputs, and peft's BOFT its inputs: another function", given="output", expected="input")
        _only_pixels(part, "BOFT")
        lengths = torch.ones(part.site.d_out, 1) if adapter.magnitude is None else adapter.magnitude.detach()[:, None]
        return {"boft_R": -skew(adapter.skew.detach(), adapter.size), "boft_s": lengths}

    def settings(self, attachment: Attachment, parts: Sequence[Part]) -> Settings:
        m = same(parts, "components, as many as", {p.path: len(p.adapter.skew) for p in parts})
        size = same(parts, "blocks of", {p.path: p.adapter.size for p in parts})
        return {
            "boft_block_size": size, "boft_block_num": 0, "boft_n_butterfly_factor": m, "bias": "none", "boft_dropout": 0.0,
            "fan_in_fan_out": False,
        }  # fmt: skip


def _plain(layer: Layer, what: str) -> None:
    """Raise for a convolution of more than one pixel or in groups, where peft's forward pass and merged weight differ."""
    if layer.site.groups != 1 or math.prod(layer.site.kernel) > 1:
        kernel = layer.site.kernel
        raise layer.refuse(f"is a convolution of {kernel}, where peft's {what} has another form", given=kernel)


def _only_pixels(part: Part, what: str) -> None:
    if part.site.groups != 1 or math.prod(part.site.kernel) > 1:
        kernel = part.site.kernel
        raise part.refuse(f"is a convolution of {kernel}, where peft's {what} has another form", given=kernel)


def _entries(q: Tensor) -> Tensor:
    """The entries above the diagonal, row by row."""
    rows, columns = torch.triu_indices(q.shape[-1], q.shape[-1], 1)
    return q[..., rows, columns]
