"""LoRA with the names of a transformer's original release and no prefix, such as Black Forest Labs' control LoRAs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.sites import ParamSite
from veneer.injection.towers import Tower, towers_of

from ._core.attach import AttachmentSpec, attach_all
from ._core.format import LayerInfo, Options, count_parameters
from ._core.layer_keys import LayerTableFormat
from ._core.lora_reader import layers_of, lora_spec
from ._io.reader import File
from ._names.kohya import NamedLayer
from ._names.modules import original_modules
from ._peft.config import NAME, read_config, reject_unsupported, scaled_alpha
from .comfyui import ComfyUI

CLASSES = (
    "FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel", "SD3Transformer2DModel",
    "Krea2Transformer2DModel",
)  # fmt: skip
PEFT = "base_model.model."
BLOCKS = re.compile(
    r"(?:base_model\.model\.)?(?:(?:double|single|joint)_blocks\.|txtfusion\.|blocks\.\d+\.(?:attn\.(?:w[qkvo]|gate)|mlp\.(?:gate|up|down))\.)"
)
BIAS = ".lora_B.bias"
NORM = re.compile(
    r"(?:base_model\.model\.)?(?P<kind>double|single)_blocks\.(?P<i>\d+)\.(?:(?P<stream>img|txt)_attn\.)?norm\.(?P<half>query|key)_norm\.scale"
)
NORMS = {(None, "query"): "norm_q", (None, "key"): "norm_k", ("img", "query"): "norm_q", ("img", "key"): "norm_k",
         ("txt", "query"): "norm_added_q", ("txt", "key"): "norm_added_k"}  # fmt: skip


class BFL(LayerTableFormat):
    """`double_blocks.{i}.img_attn.qkv.lora_A.weight` (r, d_in), `….lora_B.weight` (d_out, r), `….lora_B.bias` (d_out).

    ΔW = B A, or (alpha / r)·B A with `….alpha` (); ComfyUI's names without a prefix, of FLUX.1, FLUX.2, Chroma, SD 3
    (`joint_blocks.{i}.x_block.attn.qkv`) and Krea 2 (`blocks.{i}.attn.wq`), also as in OneTrainer's original format. FLUX.1's
    control LoRAs (Canny, Depth) have biases, which become a bitfit attachment, and complete query and key norms, which become
    trained base parameters. Their `img_in` reads the control image concatenated with the latents, 128 channels, so that they
    need a FLUX widened to this input. peft's prefix `base_model.model.` is also accepted: with peft's config beside the file,
    ΔW = (alpha / r)·B A with its alphas. Read only.
    """

    name: ClassVar[str] = "bfl"
    file: ClassVar[str] = "lora.safetensors"
    files: ClassVar[str] = "Black Forest Labs' LoRA files"
    suffixes = ComfyUI.suffixes

    def reads(self, file: File) -> bool:
        return any(BLOCKS.match(key) for key in file.shapes) and not any(".processor." in key for key in file.shapes)

    def places(self, tower: Tower) -> Sequence[NamedLayer]:
        modules = original_modules(tower) if type(tower.module).__name__ in CLASSES else []
        return [NamedLayer((m.path, PEFT + m.path), m.sites, m.swapped) for m in modules]

    def layers(self, file: File) -> list[LayerInfo]:
        beside = [key for key in file.shapes if key.endswith(BIAS) or NORM.fullmatch(key)]
        pairs = layers_of(file.restrict(file.shapes.keys() - set(beside)), self.suffixes)
        alphas = _alphas(file)
        pairs = [dataclasses.replace(p, alpha=alphas(p.name, p.rank)) if alphas and p.rank else p for p in pairs]
        return [
            *pairs,
            *(LayerInfo(key, "bitfit" if key.endswith(BIAS) else "norm", values=count_parameters(file, [key])) for key in beside),
        ]

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        biases = {key for key in file.shapes if key.endswith(BIAS)}
        norms = {key for key in file.shapes if NORM.fullmatch(key)}
        known = self.known(model)
        _reject_narrow(file, known)
        lora = lora_spec(model, file.restrict(file.shapes.keys() - biases - norms), options, known, self.suffixes, _alphas(file))
        params = {(s.path, s.param): s for t in towers_of(model) for s in t.sites if isinstance(s, ParamSite)}
        replaced = dict(_norms(file, file.tensors(options.strict, norms), params))
        lora = dataclasses.replace(lora, state={**lora.state, **replaced}, train=[key.rpartition(":")[0] for key in replaced])
        shifts = dict(_biases(file, file.tensors(options.strict, biases), known, params))
        shift = AttachmentSpec("bitfit", "bitfit", {}, list(shifts), {f"{name}:delta": t for name, t in shifts.items()})
        return attach_all(model, file, [lora, shift] if shifts else [lora], options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        message = f"{target}: this format is read only. Use comfyui, which has the same names with a prefix."
        raise SaveError(message, file=target, given=self.name, expected=("comfyui",))


def _alphas(file: File) -> Callable[[str, int], float] | None:
    """Maps a layer's name and rank to alpha, from peft's config beside a file with peft's prefix; None if there is no config.

    Raises:
        LoadError: the config is not of plain LoRA.
    """
    where = file.path.with_name(NAME)
    if not any(key.startswith(PEFT) for key in file.shapes) or not where.is_file():
        return None
    config = read_config(file)
    reject_unsupported(where, config)
    if config["peft_type"] != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config["peft_type"][:80]
        message = f"{where}: {kind} with Black Forest Labs' module names; only plain LoRA is supported with them."
        raise LoadError(message, file=where, given=kind, expected="LORA")
    return lambda name, rank: scaled_alpha(file, config, name.removeprefix(PEFT), rank)


def _reject_narrow(file: File, known: Mapping[str, NamedLayer]) -> None:
    """Raises for a control LoRA on a model without an input for a control image."""
    width = next((s[1:] for start in ("", PEFT) if (s := file.shapes.get(f"{start}img_in.lora_A.weight"))), ())
    if width and "img_in" in known and width != (known["img_in"].sites[0].d_in,):
        raise LoadError(
            f"{file.path}: reads {width[0]} input channels, but the model has {known['img_in'].sites[0].d_in}: a control LoRA "
            "needs a FLUX with a widened x_embedder (in_channels of its config, zeros in the new columns).",
            file=file.path,
            where="img_in",
            given=width[0],
            expected=known["img_in"].sites[0].d_in,
        )


def _norms(
    file: File, tensors: Mapping[str, Tensor], params: Mapping[tuple[str, str], ParamSite]
) -> Iterator[tuple[str, Tensor]]:
    """Saved name and value of each replaced norm."""
    for key, tensor in tensors.items():
        match = NORM.fullmatch(key)
        assert match is not None
        blocks = "transformer_blocks" if match["kind"] == "double" else "single_transformer_blocks"
        site = params.get((f"{blocks}.{match['i']}.attn.{NORMS[match['stream'], match['half']]}", "weight"))
        if site is None:
            message = f"{file.path}: the model has no norm for '{key}'. It was made for another base model."
            raise LoadError(message, file=file.path, where=key, unused=[key])
        yield f"{site.name}:weight", tensor


def _biases(
    file: File, tensors: Mapping[str, Tensor], known: Mapping[str, NamedLayer], params: Mapping[tuple[str, str], ParamSite]
) -> Iterator[tuple[str, Tensor]]:
    """Site of each bias and its update."""
    for key, tensor in tensors.items():
        place = known.get(key.removesuffix(BIAS))
        sites = [params.get((site.path, "bias")) for site in place.sites] if place else []
        if place is None or None in sites or tensor.shape != (sum(s.d_out for s in place.sites),):
            message = (
                f"{file.path}: '{key}' {tuple(tensor.shape)} matches no bias of the model. It was made for another base model."
            )
            raise LoadError(message, file=file.path, where=key, given=tuple(tensor.shape), expected="bias")
        whole = torch.cat(tensor.chunk(2)[::-1]) if place.swapped else tensor
        for site, part in zip(sites, whole.split([s.d_out for s in place.sites]), strict=True):
            assert site is not None
            yield site.name, part


save = BFL().save
