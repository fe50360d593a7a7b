"""OFT and BOFT in peft's format, which rotate the inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from veneer.functional.cayley import skew
from veneer.injection import Attachment

from .._lycoris.codec import SiteTensors
from .codec import PeftAdapter, PeftCodec, PeftModule, Settings, shared_value
from .config import is_enabled, module_value

SWITCHES, MOST_TERMS = ("block_share", "coft", "use_cayley_neumann"), 1_000


class OFTPeft(PeftCodec):
    """`oft_R.weight` (n, b(b−1)/2), the entries of Q above the diagonal; W' = W Rᵀ, R = (I − Q)(I + Q)⁻¹, so Q is minus veneer's.

    With `use_cayley_neumann`, peft's default, R is a truncated series in +Q: oft's `neumann_terms`. `coft` shortens each Q to
    eps / √n.
    """

    kind: ClassVar[str] = "OFT"
    method: ClassVar[str] = "oft"
    suffixes: ClassVar[tuple[str, ...]] = ("oft_R.weight", "oft_R")

    def read(self, layer: PeftModule) -> list[SiteTensors]:
        layer.expect(len(layer.parts) == 1, "one oft_R")
        matrices = next(iter(layer.parts.values()))
        width = layer.site.d_in
        _reject_convolution(layer, "OFT")
        size = round((1 + math.sqrt(1 + 8 * matrices.shape[1])) / 2) if matrices.ndim == 2 else 0
        share, shortened, series = (is_enabled(layer.file, layer.config, key) for key in SWITCHES)
        count = 1 if share else width // max(size, 1)
        right = size > 1 and matrices.shape == (count, size * (size - 1) // 2) and width % size == 0
        layer.expect(right, f"oft_R (n, b(b−1)/2) with n·b = {width}")
        coft = module_value(layer.file, layer.config, layer.path, "eps", "eps_pattern", 6e-5) if shortened else None
        layer.expect(coft is None or coft > 0, "an eps above 0 in the config")
        terms = (
            module_value(layer.file, layer.config, layer.path, "num_cayley_neumann_terms", "terms_pattern", 5) if series else None
        )
        right, name = terms is None or terms in range(1, MOST_TERMS), "num_cayley_neumann_terms"
        layer.expect(right, f"{name} from 1 to {MOST_TERMS}", option=name, given=terms)
        if terms is not None and terms > 2 and "peft_version" not in layer.config and not layer.notes:
            layer.notes.append("no peft_version: read as peft 0.18 and later, which count the series' last power once, not twice")
        options = {"block_size": size, "share": share, "coft": None if coft is None else coft / size**2, "rescale": False}
        options["neumann_terms"] = None if terms is None else int(terms)
        return [SiteTensors(layer.site, options, {"skew": matrices if series else -matrices})]

    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        if getattr(part.adapter, "site", None) is not None:
            raise part.error("rotates its outputs, but peft's OFT rotates inputs", given="output", expected="input")
        if part.adapter.magnitude is not None:
            raise part.error("has magnitudes (rescale), which peft's OFT does not have", given={"rescale": True})
        _reject_convolution_write(part, "OFT")
        entries = part.adapter.skew.detach()
        return {"oft_R.weight": -entries if part.adapter.terms is None else entries}

    def settings(self, attachment: Attachment, parts: Sequence[PeftAdapter]) -> Settings:
        size = shared_value(parts, "blocks of", {p.path: p.adapter.size for p in parts})
        coft = shared_value(parts, "coft", {p.path: p.adapter.radius and attachment.method.at(p.site).coft for p in parts})  # type: ignore[attr-defined]
        share = shared_value(parts, "share", {p.path: len(p.adapter.skew) * size != p.site.d_in for p in parts})
        terms = shared_value(parts, "neumann_terms", {p.path: p.adapter.terms for p in parts})
        series = {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
        return {
            "r": 0, "oft_block_size": size, **series, "coft": coft is not None, "block_share": share,
            "eps": 6e-5 if coft is None else coft * size**2, "bias": "none", "module_dropout": 0.0, "fan_in_fan_out": False,
        }  # fmt: skip


class BOFTPeft(PeftCodec):
    """`boft_R` (m, n, b, b), Q its skew-symmetric part, `boft_s` (d_out, 1), scales; W' = D W Rᵀ, each block (I − Q)(I + Q)⁻¹.

    peft builds more than one component only with its compiled CUDA extension.
    """

    kind: ClassVar[str] = "BOFT"
    method: ClassVar[str] = "boft"
    suffixes: ClassVar[tuple[str, ...]] = ("boft_R", "boft_s")

    def read(self, layer: PeftModule) -> list[SiteTensors]:
        matrices, lengths, width = layer.parts.get("boft_R"), layer.parts.get("boft_s"), layer.site.d_in
        _reject_convolution(layer, "BOFT")
        side = matrices.shape[-1] if matrices is not None and matrices.ndim == 4 else 0
        right = matrices is not None and side > 1 and matrices.shape[1:] == (width // side, side, side) and width % side == 0
        layer.expect(
            right and (lengths is None or lengths.numel() == layer.site.d_out), f"boft_R (m, n, b, b) with n·b = {width}"
        )
        assert matrices is not None
        q = -0.5 * (matrices - matrices.mT)
        state = {"skew": _entries(q)} | ({} if lengths is None else {"magnitude": lengths.flatten()})
        return [SiteTensors(layer.site, {"m": len(matrices), "b": side, "rescale": lengths is not None}, state)]

    def write(self, part: PeftAdapter) -> dict[str, Tensor]:
        adapter = part.adapter
        if getattr(adapter, "site", None) is not None:
            raise part.error("rotates its outputs, but peft's BOFT rotates inputs", given="output", expected="input")
        _reject_convolution_write(part, "BOFT")
        lengths = torch.ones(part.site.d_out, 1) if adapter.magnitude is None else adapter.magnitude.detach()[:, None]
        return {"boft_R": -skew(adapter.skew.detach(), adapter.size), "boft_s": lengths}

    def settings(self, attachment: Attachment, parts: Sequence[PeftAdapter]) -> Settings:
        m = shared_value(parts, "components, as many as", {p.path: len(p.adapter.skew) for p in parts})
        size = shared_value(parts, "blocks of", {p.path: p.adapter.size for p in parts})
        return {
            "boft_block_size": size, "boft_block_num": 0, "boft_n_butterfly_factor": m, "bias": "none", "boft_dropout": 0.0,
            "fan_in_fan_out": False,
        }  # fmt: skip


def _reject_convolution(layer: PeftModule, what: str) -> None:
    """Raises for a convolution with groups or a kernel larger than 1×1, where peft's forward pass and merged weight differ."""
    if layer.site.groups != 1 or math.prod(layer.site.kernel) > 1:
        kernel = layer.site.kernel
        raise layer.error(f"is a convolution with kernel {kernel}, for which peft's {what} differs", given=kernel)


def _reject_convolution_write(part: PeftAdapter, what: str) -> None:
    if part.site.groups != 1 or math.prod(part.site.kernel) > 1:
        kernel = part.site.kernel
        raise part.error(f"is a convolution with kernel {kernel}, for which peft's {what} differs", given=kernel)


def _entries(q: Tensor) -> Tensor:
    """The entries above the diagonal, row by row."""
    rows, columns = torch.triu_indices(q.shape[-1], q.shape[-1], 1)
    return q[..., rows, columns]
