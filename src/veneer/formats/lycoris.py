"""What is not plain LoRA, as LyCORIS and kohya's sd-scripts write it, and A1111, Forge and (but for (IA)³) ComfyUI read it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from veneer.injection import Attachment, LoadError, SaveError, VeneerError
from veneer.injection.towers import towers_of

from ._core.attach import Wanted, attach_all
from ._core.format import Format, Layer, Options, listed, values
from ._core.lora_config import refuse_trained
from ._core.lora_reader import DOWN, UP
from ._core.lora_writer import Places, by_place
from ._io.reader import File
from ._io.writer import destination, write
from ._lycoris.codec import Codec, Group, Module, Piece
from ._lycoris.glora import GLoRACodec
from ._lycoris.ia3 import IA3Codec
from ._lycoris.loha import LoHaCodec
from ._lycoris.lokr import LoKrCodec
from ._lycoris.lora import DoRACodec, LoRACodec
from ._lycoris.names import PREFIXES, dotted, readable, written
from ._lycoris.oft import BOFTCodec, OFTCodec
from ._lycoris.onetrainer_oft import InputOFTCodec
from ._names.kohya import Place, version
from .kohya import base_metadata, numbered

# in the order in which a module is offered to them: dora before lora, whose tensors it has, too; of two of one method the
# last writes
CODECS: tuple[Codec, ...] = (
    DoRACodec(), LoHaCodec(), LoKrCodec(), InputOFTCodec(), OFTCodec(), BOFTCodec(), GLoRACodec(), IA3Codec(), LoRACodec(),
)  # fmt: skip
BY_METHOD = {codec.method: codec for codec in CODECS}
ENDS = ("alpha", *(end for codec in CODECS for end in codec.ends))
SPELLINGS = {"lora_A.weight": DOWN, "lora_B.weight": UP, "magnitude": "dora_scale"}  # of OneTrainer for ComfyUI, of ai-toolkit
MARKS = tuple(f".{end}" for end in (*ENDS, "magnitude") if end not in ("alpha", "weight", *LoRACodec.ends))
OTHERS = {
    "diff": "full weights", "diff_b": "full weights", "w_norm": "norms", "b_norm": "norms", "oft_diag": "OFT of an older LyCORIS",
    "lambda_layer": "T-LoRA", "bm.weight": "GLoRA in a Tucker form", "lokr_t1": "LoKr in a form that no tool writes",
    "set_weight": "weights of its own", "reshape_weight": "weights of another shape",
}  # fmt: skip
OTHER_MARKS = tuple(f".{end}" for end in OTHERS)
Written = tuple[Codec, Group, dict[str, Tensor]]  # one module of a saved file and its tensors by the ends of their keys


class Lycoris(Format):
    """`{module}.{end}`: LoRA, DoRA, LoHa, LoKr, OFT, BOFT, GLoRA and (IA)³, each module by its own method.

    `{module}` as in kohya's layout (`lora_unet_…`, `lora_te…`; ComfyUI's dotted names are read as well), or for any other model
    `lycoris_` and its own path with underscores. LoKr of a fused projection's slices that is no Kronecker product of the whole is
    written under diffusers' paths, `transformer.{path}.lokr_w1`, as ai-toolkit does; ComfyUI reads it. The ends are in the
    codecs, one a method. Each method of a file becomes an attachment of its own, all or none; ranks, alphas and splits may
    differ by module.

    Missing alpha means alpha = rank, and an alpha of 0, which is read in two ways, is refused. What no method here holds (full
    weights, norms, T-LoRA) is refused by name, as is on writing what is another function in this layout: input-side OFT and
    BOFT, elementwise GLoRA, grouped convolutions but for LoHa and LoKr, slices of a fused projection that are not of that form
    together.
    Source: KohakuBlueleaf/LyCORIS 4.1 `lycoris/modules`, `lycoris/kohya.py`; kohya-ss/sd-scripts `networks/oft.py`,
    `networks/oft_flux.py`, `networks/lokr.py`; ComfyUI `comfy/weight_adapter`. LyCORIS' `get_diff_weight` of LoHa and LoKr has
    the scale twice; its forward pass, which trains, and other readers have it once, as here.
    """

    name: ClassVar[str] = "lycoris"
    file: ClassVar[str] = "lycoris.safetensors"
    order: ClassVar[int] = -1

    def reads(self, file: File) -> bool:
        if any(key.startswith(("lora_transformer_", "bundle_emb.")) for key in file.shapes):  # OneTrainer's, text encoders too
            return False
        named = [key for key in file.shapes if key.startswith(PREFIXES)]
        return (bool(named) and marked(file.shapes)) or any(key.startswith(PREFIXES[-2:]) for key in named)

    def layers(self, file: File) -> list[Layer]:
        alphas = file.tensors(finite=False, names={key for key in file.shapes if key.endswith(".alpha")})
        found = []
        for name, keys in _named(file).items():
            shapes = {end: file.shapes[key] for end, key in keys.items()}
            codec, other = _codec(shapes), next((OTHERS[end] for end in shapes if end in OTHERS), None)
            rank = codec.rank(shapes) if codec else None
            alpha = alphas.get(f"{name}.alpha")
            said = float(alpha) if alpha is not None and alpha.numel() == 1 else rank
            method = other or (codec.method if codec else "unknown")
            found.append(Layer(name, method, rank, None if rank is None else said, values(file, keys.values())))
        return found

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        return attach_all(model, file, wanted(model, file, options), options)

    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        target, several = destination(path, self.file), listed(attachments)
        versions = {v for a in several for m in a.towers.values() if (v := version(m))}
        names = partial(written, numbered=numbered(several, versions))
        tensors: dict[str, Tensor] = {}
        groups: list[Written] = []
        names_written: set[str] = set()
        for attachment in several:
            codec = _writer(attachment, target)
            for place, adapters in _places(codec, attachment, target, names):
                name, group = place.names[0], Group(place, adapters, attachment.towers)
                if name in names_written:
                    message = f"{target}: two attachments adapt '{name}', and the format holds one. Save them to two files."
                    raise SaveError(message, file=target, where=name, given=2, expected=1)
                found = _tensors(codec, group, target)
                tensors |= {f"{name}.{end}": tensor for end, tensor in found.items()}
                names_written.add(name)
                groups.append((codec, group, found))
        if not tensors:
            raise SaveError(f"{target}: there is no attachment to save.", file=target, given=0, expected=1)
        metadata = {"format": "pt", **_metadata(groups), **base_metadata(versions)}
        if provenance:
            metadata["provenance"] = json.dumps(dict(provenance))
        return write(target, tensors, metadata)


# reading


def marked(keys: Iterable[str]) -> bool:
    """True if one of the keys is of something that is no plain LoRA."""
    return any(key.endswith((*MARKS, *OTHER_MARKS)) for key in keys)


def wanted(model: Any, file: File, options: Options, known: Mapping[str, Place] | None = None) -> list[Wanted]:
    """An attachment for each method of the file.

    Args:
        known: the modules that the model has by every name that they go by in the file; None for this layout's own.
    Raises:
        LoadError: changes that no method holds, modules that the model does not have, or tensors that do not fit.
    """
    _refuse_others(file)
    named, tensors = _named(file), file.tensors(finite=options.strict)
    known = readable(model, file, named) if known is None else known
    towers = {tower.component: tower.module for tower in towers_of(model)}
    notes: list[str] = []
    pieces: dict[str, list[Piece]] = {}
    taken: dict[str, str] = {}
    used: set[str] = set()
    for name, keys in named.items():
        codec = _codec({end: file.shapes[key] for end, key in keys.items()})
        if codec is None or name not in known:
            continue
        module = Module(file, name, known[name], {end: tensors[key] for end, key in keys.items()}, towers, notes)
        for piece in _read(codec, module):
            other = taken.setdefault(piece.site.name, name)
            if other != name:
                message = f"{file.path}: '{name}' and '{other}' both change '{piece.site.name}'. The file is damaged."
                raise LoadError(message, file=file.path, where=piece.site.name, given=(name, other))
            pieces.setdefault(codec.method, []).append(piece)
        used |= {key for end, key in keys.items() if end in (*codec.ends, "alpha")}
        if codec.rank({end: file.shapes[key] for end, key in keys.items()}) is not None and "alpha" not in keys:
            notes.append("no alpha: alpha = rank")
    unused = [key for key in file.shapes if key not in used]
    if (unused and options.strict) or not pieces:
        raise LoadError(
            f"{file.path}: unused {len(unused)} of {len(file.shapes)} tensors: {', '.join(unused[:8])}. The model has no weights "
            "of these names, or they are no part of a known change: load it on the model that it was made for, or pass "
            "strict=False.",
            file=file.path,
            unused=unused,
        )
    told = [f"{note} ({count} of {len(named)} modules)" for note, count in Counter(notes).items()]
    return [
        _attachment(BY_METHOD[method], found, told if i == 0 else [], unused if i == 0 else [])
        for i, (method, found) in enumerate(pieces.items())
    ]


def _attachment(codec: Codec, pieces: Sequence[Piece], notes: Sequence[str], unused: Sequence[str]) -> Wanted:
    state = {f"{p.site.name}:{key}": tensor for p in pieces for key, tensor in p.state.items()}
    sites = [p.site.name for p in pieces]
    return Wanted(codec.method, codec.method, codec.config(pieces), sites, state, notes=notes, unused=unused)


def _read(codec: Codec, module: Module) -> list[Piece]:
    groups = module.first.groups
    if groups > 1 and not codec.groups:
        why = f"is {codec.method} of a convolution in {groups} groups, which is another function here"
        raise module.refuse(why, given=groups, expected=1)
    return codec.read(module)


def _named(file: File) -> dict[str, dict[str, str]]:
    """The keys of each module, by their ends; what ends in no known way is in none."""
    found: dict[str, dict[str, str]] = {}
    for key in file.shapes:
        end = max((e for e in (*ENDS, *SPELLINGS, *OTHERS) if key.endswith(f".{e}")), key=len, default=None)
        if end is not None:
            found.setdefault(key[: -len(end) - 1], {}).setdefault(SPELLINGS.get(end, end), key)
    return found


def _codec(shapes: Mapping[str, tuple[int, ...]]) -> Codec | None:
    return next((codec for codec in CODECS if codec.mine(shapes)), None)


def _refuse_others(file: File) -> None:
    for key in file.shapes:
        what = next((what for end, what in OTHERS.items() if key.endswith(f".{end}")), None)
        if what is not None:
            raise LoadError(
                f"{file.path}: '{key}' is {what}, which no method here holds: without it the rest would be wrong, so nothing is "
                "loaded.",
                file=file.path,
                where=key,
                given=what,
            )


# writing


def _writer(attachment: Attachment, target: Path) -> Codec:
    codec = BY_METHOD.get(attachment.method.name)
    if codec is None:
        raise SaveError(
            f"{target}: '{attachment.name}' is {attachment.method.name}; LyCORIS' files hold {', '.join(sorted(BY_METHOD))}. "
            "The native file (Attachment.save) holds it.",
            file=target,
            where=attachment.name,
            given=attachment.method.name,
            expected=tuple(sorted(BY_METHOD)),
        )
    refuse_trained(attachment, target, "LyCORIS' files")
    return codec


def _places(codec: Codec, attachment: Attachment, target: Path, names: Places) -> list[tuple[Place, dict[str, Any]]]:
    """The modules of an attachment; under diffusers' paths if LoKr of some fused projection's slices is none of the whole."""
    found = by_place(attachment, target, names)
    if isinstance(codec, LoKrCodec) and not all(codec.joins(Group(p, adapters, attachment.towers)) for p, adapters in found):
        return by_place(attachment, target, dotted)
    return found


def _tensors(codec: Codec, group: Group, target: Path) -> dict[str, Tensor]:
    """The tensors of one module.

    Raises:
        SaveError: the layout cannot hold it.
    """
    try:
        if group.site.groups > 1 and not codec.groups:
            why = f"is {codec.method} of a convolution in {group.site.groups} groups, which is another function there"
            raise group.refuse(why, given=group.site.groups, expected=1)
        return codec.write(group)
    except VeneerError as error:
        raise SaveError.from_error(error, f"{target}: {error}", file=target) from error


def _metadata(groups: Sequence[Written]) -> dict[str, str]:
    """What sd-scripts write where LyCORIS is their network: its name, rank, alpha, and what it was told."""
    codec = Counter(codec for codec, _, _ in groups).most_common(1)[0][0]
    args = {key: value for c, group, _ in groups if c is codec for key, value in c.args(group).items()}
    ranks = [rank for c, _, parts in groups if c is codec and (rank := c.rank(_shapes(parts))) is not None]
    alphas = [float(parts["alpha"]) for c, _, parts in groups if c is codec and "alpha" in parts]
    common = [Counter(found).most_common(1)[0][0] for found in (ranks, alphas) if found and ranks]
    found = dict(zip(("ss_network_dim", "ss_network_alpha"), map(str, common), strict=False))
    return {"ss_network_module": "lycoris.kohya", **found, "ss_network_args": json.dumps({"algo": codec.algo, **args})}


def _shapes(parts: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {end: tuple(tensor.shape) for end, tensor in parts.items()}


save = Lycoris().save
