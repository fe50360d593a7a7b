"""Adapters other than plain LoRA, as LyCORIS and sd-scripts write them; A1111, Forge and (except (IA)³) ComfyUI read them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from veneer.injection import Attachment, LoadError, SaveError, VeneerError
from veneer.injection.towers import towers_of

from ._core.attach import AttachmentSpec, attach_all
from ._core.format import Format, LayerInfo, Options, count_parameters, pt_metadata
from ._core.lora_config import reject_trained_base
from ._core.lora_reader import DOWN, UP
from ._core.lora_writer import LayerNames, adapters_by_layer
from ._io.model_spec import HASHES, model_spec
from ._io.reader import File
from ._io.writer import write
from ._lycoris.codec import AdapterGroup, Codec, LycorisModule, SiteTensors
from ._lycoris.glora import GLoRACodec
from ._lycoris.ia3 import IA3Codec
from ._lycoris.loha import LoHaCodec
from ._lycoris.lokr import LoKrCodec
from ._lycoris.lora import DoRACodec, LoRACodec
from ._lycoris.names import PREFIXES, dotted_layers, readable_layers, written_layers
from ._lycoris.oft import BOFTCodec, OFTCodec
from ._lycoris.onetrainer_oft import InputOFTCodec
from ._names.kohya import NamedLayer, base_model_version
from .kohya import is_numbered

# In order of precedence: DoRA before LoRA, because it has LoRA's tensors too. The last codec of a method writes its files.
CODECS: tuple[Codec, ...] = (
    DoRACodec(), LoHaCodec(), LoKrCodec(), InputOFTCodec(), OFTCodec(), BOFTCodec(), GLoRACodec(), IA3Codec(), LoRACodec(),
)  # fmt: skip
BY_METHOD = {codec.method: codec for codec in CODECS}
SUFFIXES = ("alpha", *(suffix for codec in CODECS for suffix in codec.suffixes))
SPELLINGS = {"lora_A.weight": DOWN, "lora_B.weight": UP, "magnitude": "dora_scale"}  # OneTrainer for ComfyUI; ai-toolkit
NOT_LORA = tuple(f".{suffix}" for suffix in (*SUFFIXES, "magnitude") if suffix not in ("alpha", "weight", *LoRACodec.suffixes))
UNSUPPORTED = {
    "diff": "full weights", "diff_b": "full weights", "w_norm": "norms", "b_norm": "norms", "oft_diag": "OFT of an older LyCORIS",
    "lambda_layer": "T-LoRA", "bm.weight": "GLoRA in a Tucker form", "lokr_t1": "LoKr in a form that no tool writes",
    "set_weight": "a replacement weight", "reshape_weight": "a weight of another shape",
}  # fmt: skip
UNSUPPORTED_SUFFIXES = tuple(f".{suffix}" for suffix in UNSUPPORTED)
WrittenModule = tuple[Codec, AdapterGroup, dict[str, Tensor]]  # one module of a saved file and its tensors by key suffix


class Lycoris(Format):
    """`{module}.{suffix}`: LoRA, DoRA, LoHa, LoKr, OFT, BOFT, GLoRA and (IA)³, each module with its own method.

    `{module}` as in kohya's format (`lora_unet_…`, `lora_te…`; ComfyUI's dotted names are also read), or for any other model
    `lycoris_` and its path with underscores. If LoKr of a fused projection's slices does not form one Kronecker product, it is
    written under diffusers' paths, `transformer.{path}.lokr_w1`, as in ai-toolkit; ComfyUI reads it. The codecs, one per
    method, define the key suffixes. A file is loaded as one attachment per method, all or nothing; ranks, alphas and splits may
    differ between modules.

    A missing alpha means alpha = rank; an alpha of 0, which tools interpret in two ways, is rejected. Adapters that
    veneer does not support (full weights, norms, T-LoRA) are rejected with their names. On writing, adapters that the format does
    not support are rejected: input-side OFT and BOFT, elementwise GLoRA, grouped convolutions except for LoHa and LoKr, and
    slices of a fused projection that cannot be merged.
    Source: KohakuBlueleaf/LyCORIS 4.1 `lycoris/modules`, `lycoris/kohya.py`; kohya-ss/sd-scripts `networks/oft.py`,
    `networks/oft_flux.py`, `networks/lokr.py`; ComfyUI `comfy/weight_adapter`. LyCORIS' `get_diff_weight` of LoHa and LoKr
    applies the scale twice; its forward pass, used in training, and other readers apply it once, as here.
    """

    name: ClassVar[str] = "lycoris"
    file: ClassVar[str] = "lycoris.safetensors"
    order: ClassVar[int] = -1

    def reads(self, file: File) -> bool:
        if any(key.startswith(("lora_transformer_", "bundle_emb.")) for key in file.shapes):  # OneTrainer
            return False
        prefixed = [key for key in file.shapes if key.startswith(PREFIXES)]
        return (bool(prefixed) and has_other_methods(file.shapes)) or any(key.startswith(PREFIXES[-2:]) for key in prefixed)

    def layers(self, file: File) -> list[LayerInfo]:
        alphas = file.tensors(finite=False, names={key for key in file.shapes if key.endswith(".alpha")})
        infos = []
        for name, keys in _keys_by_module(file).items():
            shapes = {suffix: file.shapes[key] for suffix, key in keys.items()}
            codec, unsupported = _codec(shapes), next((UNSUPPORTED[suffix] for suffix in shapes if suffix in UNSUPPORTED), None)
            rank = codec.rank(shapes) if codec else None
            tensor = alphas.get(f"{name}.alpha")
            alpha = float(tensor) if tensor is not None and tensor.numel() == 1 else rank
            method = unsupported or (codec.method if codec else "unknown")
            infos.append(LayerInfo(name, method, rank, None if rank is None else alpha, count_parameters(file, keys.values())))
        return infos

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        return attach_all(model, file, lycoris_specs(model, file, options), options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        versions = {v for a in attachments for m in a.towers.values() if (v := base_model_version(m))}
        names = partial(written_layers, numbered=is_numbered(attachments, versions))
        tensors: dict[str, Tensor] = {}
        modules: list[WrittenModule] = []
        used_names: set[str] = set()
        for attachment in attachments:
            codec = _writer(attachment, target)
            for layer, adapters in _layers_to_write(codec, attachment, target, names):
                name, group = layer.names[0], AdapterGroup(layer, adapters, attachment.towers)
                if name in used_names:
                    message = (
                        f"{target}: two attachments adapt '{name}', but the format supports one. Save them to separate files."
                    )
                    raise SaveError(message, file=target, where=name, given=2, expected=1)
                by_suffix = _module_tensors(codec, group, target)
                tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in by_suffix.items()}
                used_names.add(name)
                modules.append((codec, group, by_suffix))
        if not tensors:
            raise SaveError(f"{target}: no attachment to save.", file=target, given=0, expected=1)
        return write(target, tensors, pt_metadata(provenance, _metadata(modules) | model_spec(attachments, provenance)), HASHES)


# reading


def has_other_methods(keys: Iterable[str]) -> bool:
    """True if a key belongs to an adapter other than plain LoRA."""
    return any(key.endswith((*NOT_LORA, *UNSUPPORTED_SUFFIXES)) for key in keys)


def lycoris_specs(
    model: Any, file: File, options: Options, known: Mapping[str, NamedLayer] | None = None
) -> list[AttachmentSpec]:
    """Specifications of the attachments, one for each method of the file.

    Args:
        known: the modules of the model by their names in files; None for the names of this format.
    Raises:
        LoadError: unsupported adapters, modules that the model does not have, or tensors of a wrong shape.
    """
    _reject_unsupported(file)
    by_module, tensors = _keys_by_module(file), file.tensors(finite=options.strict)
    known = readable_layers(model, file, by_module) if known is None else known
    towers = {tower.component: tower.module for tower in towers_of(model)}
    notes: list[str] = []
    pieces: dict[str, list[SiteTensors]] = {}
    owners: dict[str, str] = {}
    used: set[str] = set()
    for name, keys in by_module.items():
        codec = _codec({suffix: file.shapes[key] for suffix, key in keys.items()})
        if codec is None or name not in known:
            continue
        by_suffix = {suffix: tensors[key] for suffix, key in keys.items()}
        module = LycorisModule(file, name, known[name], by_suffix, towers, notes)
        for piece in _read(codec, module):
            other = owners.setdefault(piece.site.name, name)
            if other != name:
                message = f"{file.path}: '{name}' and '{other}' both update '{piece.site.name}'. The file is corrupt."
                raise LoadError(message, file=file.path, where=piece.site.name, given=(name, other))
            pieces.setdefault(codec.method, []).append(piece)
        used |= {key for suffix, key in keys.items() if suffix in (*codec.suffixes, "alpha")}
        if codec.rank({suffix: file.shapes[key] for suffix, key in keys.items()}) is not None and "alpha" not in keys:
            notes.append("no alpha: alpha = rank")
    unused = [key for key in file.shapes if key not in used]
    if (unused and options.strict) or not pieces:
        raise LoadError(
            f"{file.path}: unused {len(unused)} of {len(file.shapes)} tensors: {', '.join(unused[:8])}. The model has no weights "
            "of these names, or they belong to no known adapter. Load it on the model it was made for, or pass "
            "strict=False.",
            file=file.path,
            unused=unused,
        )
    counted_notes = [f"{note} ({count} of {len(by_module)} modules)" for note, count in Counter(notes).items()]
    return [
        _spec(BY_METHOD[method], of_method, counted_notes if i == 0 else [], unused if i == 0 else [])
        for i, (method, of_method) in enumerate(pieces.items())
    ]


def _spec(codec: Codec, pieces: Sequence[SiteTensors], notes: Sequence[str], unused: Sequence[str]) -> AttachmentSpec:
    state = {f"{p.site.name}:{key}": tensor for p in pieces for key, tensor in p.state.items()}
    sites = [p.site.name for p in pieces]
    return AttachmentSpec(codec.method, codec.method, codec.config(pieces), sites, state, notes=notes, unused=unused)


def _read(codec: Codec, module: LycorisModule) -> list[SiteTensors]:
    groups = module.first.groups
    if groups > 1 and not codec.groups:
        reason = f"is {codec.method} of a convolution with {groups} groups, which veneer computes differently"
        raise module.error(reason, given=groups, expected=1)
    return codec.read(module)


def _keys_by_module(file: File) -> dict[str, dict[str, str]]:
    """The keys of each module, by suffix; keys with unknown suffixes are omitted."""
    by_module: dict[str, dict[str, str]] = {}
    for key in file.shapes:
        suffix = max((s for s in (*SUFFIXES, *SPELLINGS, *UNSUPPORTED) if key.endswith(f".{s}")), key=len, default=None)
        if suffix is not None:
            by_module.setdefault(key[: -len(suffix) - 1], {}).setdefault(SPELLINGS.get(suffix, suffix), key)
    return by_module


def _codec(shapes: Mapping[str, tuple[int, ...]]) -> Codec | None:
    return next((codec for codec in CODECS if codec.matches(shapes)), None)


def _reject_unsupported(file: File) -> None:
    for key in file.shapes:
        kind = next((kind for suffix, kind in UNSUPPORTED.items() if key.endswith(f".{suffix}")), None)
        if kind is not None:
            raise LoadError(
                f"{file.path}: '{key}' is {kind}, which veneer does not support. Without it the other tensors would give a wrong "
                "result, so nothing was loaded.",
                file=file.path,
                where=key,
                given=kind,
            )


# writing


def _writer(attachment: Attachment, target: Path) -> Codec:
    codec = BY_METHOD.get(attachment.method.name)
    if codec is None:
        raise SaveError(
            f"{target}: '{attachment.name}' uses {attachment.method.name}; LyCORIS files support {', '.join(sorted(BY_METHOD))}. "
            "Save it with Attachment.save (native format).",
            file=target,
            where=attachment.name,
            given=attachment.method.name,
            expected=tuple(sorted(BY_METHOD)),
        )
    reject_trained_base(attachment, target, "LyCORIS' files")
    return codec


def _layers_to_write(
    codec: Codec, attachment: Attachment, target: Path, names: LayerNames
) -> list[tuple[NamedLayer, dict[str, Any]]]:
    """Layers of the file with their adapters; diffusers' layers if LoKr of fused slices does not form one Kronecker product."""
    layers = adapters_by_layer(attachment, target, names)
    if isinstance(codec, LoKrCodec) and not all(
        codec.can_merge(AdapterGroup(layer, adapters, attachment.towers)) for layer, adapters in layers
    ):
        return adapters_by_layer(attachment, target, dotted_layers)
    return layers


def _module_tensors(codec: Codec, group: AdapterGroup, target: Path) -> dict[str, Tensor]:
    """The tensors of one module, by key suffix.

    Raises:
        SaveError: the format does not support it.
    """
    try:
        if group.site.groups > 1 and not codec.groups:
            reason = f"is {codec.method} of a convolution with {group.site.groups} groups, which this format defines differently"
            raise group.error(reason, given=group.site.groups, expected=1)
        return codec.write(group)
    except VeneerError as error:
        raise SaveError.from_error(error, f"{target}: {error}", file=target) from error


def _metadata(modules: Sequence[WrittenModule]) -> dict[str, str]:
    """The metadata that sd-scripts writes for LyCORIS networks, with the most common method, rank and alpha."""
    codec = Counter(codec for codec, _, _ in modules).most_common(1)[0][0]
    args = {key: value for c, group, _ in modules if c is codec for key, value in c.args(group).items()}
    ranks = [rank for c, _, tensors in modules if c is codec and (rank := c.rank(_shapes(tensors))) is not None]
    alphas = [float(tensors["alpha"]) for c, _, tensors in modules if c is codec and "alpha" in tensors]
    most_common = [Counter(values).most_common(1)[0][0] for values in (ranks, alphas) if values and ranks]
    fields = dict(zip(("ss_network_dim", "ss_network_alpha"), map(str, most_common), strict=False))
    return {"ss_network_module": "lycoris.kohya", **fields, "ss_network_args": json.dumps({"algo": codec.algo, **args})}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}


save = Lycoris().save
