"""LoRA as OneTrainer writes it, with token embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from veneer.injection import Attachment, LoadError
from veneer.injection.sites import VocabularySite
from veneer.injection.towers import Tower, towers_of

from ._core.attach import AttachmentSpec, attach_all
from ._core.format import LayerInfo, Options, pt_metadata
from ._core.layer_keys import LayerTableFormat
from ._core.lora_config import ENCODERS, component_of
from ._core.lora_reader import lora_spec
from ._core.lora_writer import LayerTensors, layers_to_write
from ._core.token_embeddings import UNNAMED, check_vectors, encoder_names, rows_by_encoder
from ._io.reader import File
from ._io.writer import write
from ._names.kohya import NamedLayer
from ._names.kohya import readable_layers as kohya_places
from ._names.modules import T5, diffusers_modules, original_modules, sliced_modules, weight_paths
from ._peft.low_rank import MAGNITUDE
from ._peft.tensors import peft_specs as peft_wanted
from .comfyui import ComfyUI
from .diffusers import METADATA, Diffusers
from .lycoris import Lycoris, has_other_methods
from .lycoris import lycoris_specs as others

BUNDLE = "bundle_emb."
OWN = ("lora_transformer_", BUNDLE)
OMI = ("transformer", "unet", "clip_l", "clip_g", "t5")
DOTTED = tuple(f"{name}." for name in (*OMI, "text_encoder", "text_encoder_2", "text_encoder_3"))
TRAINED = (".lora_down.weight", ".hada_w1_a", ".dora_scale", ".oft_R.weight")  # suffixes that mark adapters under dotted names
ENCODER_NAMES = ("clip_l", "clip_g", "t5")
A1111 = ".string_to_param.*"  # a token embedding in A1111's form: for the encoder of its width


class OneTrainer(LayerTableFormat):
    """`lora_transformer_{path}.lora_down.weight` (r, d_in), `….lora_up.weight` (d_out, r), `….alpha` (); ΔW = (alpha / r)·B A.

    `{path}`: diffusers' with underscores; `lora_unet_` for UNets. Text encoders: `lora_te_` if there is only one, else
    `lora_te1_`, `lora_te2_` (FLUX's T5 too), `lora_te3_` (SD 3's T5). Token embeddings: `bundle_emb.{word}.clip_l` (n, width),
    `….clip_g`, `….t5`. Also read are its OMI names, `transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight`, where a
    number indexes the projections of a fused layer, with `unet.`, `clip_l.`, `clip_g.` and `t5.`; kohya's names with token
    embeddings; diffusers' dotted paths, `transformer.{path}`, `text_encoder.{path}`, as in its backups and in files of
    ai-toolkit; ComfyUI's names, and `lora_A` and `lora_B`, with token embeddings; DoRA, LoHa, LoKr and OFT with the suffixes
    of the LyCORIS format.
    Source: Nerogar/OneTrainer `modules/util/convert/lora`, `modules/modelSaver`; ComfyUI `comfy/lora.py`.
    """

    name: ClassVar[str] = "onetrainer"
    file: ClassVar[str] = "lora.safetensors"
    files: ClassVar[str] = "OneTrainer's LoRA files"
    suffixes = ComfyUI.suffixes

    def reads(self, file: File) -> bool:
        return any(key.startswith(OWN) or (key.startswith(DOTTED) and key.endswith(TRAINED)) for key in file.shapes)

    def places(self, tower: Tower) -> Sequence[NamedLayer]:
        prefix = _prefix(tower)
        if not prefix:
            return []
        root = "text_model_" if type(tower.module).__name__ in ENCODERS else ""
        layers = {p: p if not root or p.startswith("text_projection") else root + p for p in weight_paths(tower)}
        slices = [(m.path, m.sites) for m in sliced_modules(tower, diffusers_modules(tower))]
        sites = [*slices, *((path, (site,)) for path, site in weight_paths(tower).items())]
        return [NamedLayer((f"{prefix}_{layers[path].replace('.', '_')}",), parts) for path, parts in sites]

    def readable(self, tower: Tower) -> Iterator[NamedLayer]:
        yield from kohya_places(tower)
        yield from self.places(tower)
        yield from _dotted_layers(tower)
        yield from ComfyUI().readable(tower)
        first = _omi(tower)
        for module in original_modules(tower) if first else ():
            path = "img_in.proj" if module.path == "img_in" else module.path
            if len(module.sites) == 1:
                yield NamedLayer((f"{first}.{path}",), module.sites, module.swapped)
            for i, site in enumerate(module.sites if len(module.sites) > 1 else ()):
                yield NamedLayer((f"{first}.{path}.{i}",), (site,))

    def layers(self, file: File) -> list[LayerInfo]:
        words = {key: shape for key, shape in file.shapes.items() if key.startswith(BUNDLE)}
        rest = file.restrict(file.shapes.keys() - words.keys())
        if has_other_methods(rest.shapes):
            found = Lycoris().layers(rest)
        else:
            found = Diffusers().layers(rest) if _is_peft_dora(rest) else super().layers(rest)
        return [
            *found,
            *(LayerInfo(key, "textual_inversion", values=shape[0] * shape[-1]) for key, shape in words.items() if shape),
        ]

    def words(self, file: File) -> list[str]:
        keys = [key.removeprefix(BUNDLE).rpartition(".")[0] for key in file.shapes if key.startswith(BUNDLE)]
        return list(dict.fromkeys(filter(None, keys))) or super().words(file)

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        words = {key for key in file.shapes if key.startswith(BUNDLE)}
        rest = file.restrict(file.shapes.keys() - words)
        found = list(_token_specs(file, model, file.tensors(options.strict, words), options))
        if has_other_methods(rest.shapes):
            found += others(model, rest, options, self.known(model))
        elif _is_peft_dora(rest):
            found += peft_wanted(model, rest, rest.json(METADATA), options)
        elif rest.shapes:
            found.append(lora_spec(model, rest, options, self.known(model), self.suffixes))
        return attach_all(model, file, found, options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        learned = [a for a in attachments if a.method.name == "textual_inversion"]
        tensors = {key: rows for attachment in learned for key, rows in _bundle_tensors(attachment, target)}
        rest = [a for a in attachments if a not in learned]
        layers = layers_to_write(rest, target, self.places, self.files) if rest or not learned else {}
        return write(target, LayerTensors(layers, self.tensors, tensors), pt_metadata(provenance))


def _is_peft_dora(file: File) -> bool:
    """True if a file has magnitudes as OneTrainer writes them for diffusers."""
    return any(f".{MAGNITUDE}" in key for key in file.shapes)


def _prefix(tower: Tower) -> str:
    """Prefix of a tower's layer names; empty if OneTrainer has none."""
    component = tower.component or component_of(tower.module)
    if type(tower.module).__name__ in (*ENCODERS, T5):
        several = any(name.startswith("text_encoder_") for name in tower.components) or not tower.component
        number = component.rpartition("_")[2] if component != "text_encoder" else "1" if several else ""
        return f"lora_te{number}" if component or not tower.component else ""
    return {"unet": "lora_unet", "transformer": "lora_transformer"}.get(component, "")


def _omi(tower: Tower) -> str:
    """Prefix of a tower's OMI names."""
    component = tower.component or component_of(tower.module)
    if type(tower.module).__name__ == T5:
        return "t5"
    return {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}.get(component, component)


def _dotted_layers(tower: Tower) -> Iterator[NamedLayer]:
    """The layers by component and diffusers' path, as OneTrainer's backups and ai-toolkit name them."""
    component = tower.component or component_of(tower.module)
    clip = type(tower.module).__name__ in ENCODERS
    for path, site in weight_paths(tower).items() if component else ():
        yield NamedLayer((f"{component}.{path}", *([f"{component}.text_model.{path}"] if clip else [])), (site,))


def _token_specs(file: File, model: Any, tensors: Mapping[str, Tensor], options: Options) -> Iterator[AttachmentSpec]:
    """Specifications of the attachments, one per token, at every text encoder that it has vectors for.

    Raises:
        LoadError: vectors that are added to the encoder's output, or that match no encoder.
    """
    places = [s for tower in towers_of(model) for s in tower.sites if isinstance(s, VocabularySite)] if tensors else []
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        word, _, encoder = key.removeprefix(BUNDLE).rpartition(".")
        if key.endswith(A1111):
            word, encoder = key[len(BUNDLE) : -len(A1111)], UNNAMED
        if not word or encoder not in (*ENCODER_NAMES, UNNAMED):
            raise LoadError(
                f"{file.path}: '{key}' is not a token embedding for one of {', '.join(ENCODER_NAMES)}. Vectors that are added to "
                "a text encoder's output ('_out') are not supported.",
                file=file.path,
                where=key,
                given=encoder,
                expected=tuple(ENCODER_NAMES),
            )
        found.setdefault(word, {})[encoder] = tensor[None] if tensor.ndim == 1 else tensor
    if options.token is not None and len(found) > 1:
        message = f"{file.path}: has {len(found)} tokens, {', '.join(found)}; token= can rename only one."
        raise LoadError(message, file=file.path, option="token", given=tuple(found), expected=1)
    for word, by_name in found.items():
        rows = rows_by_encoder(file, by_name, places)
        for site, vectors in rows:
            check_vectors(file, site, vectors, 1)
        state = {f"{site.name}:vectors": vectors for site, vectors in rows}
        config = {"tokens": options.token or word, "vectors": len(rows[0][1])}
        yield AttachmentSpec("textual_inversion", "textual_inversion", config, [site.name for site, _ in rows], state)


def _bundle_tensors(attachment: Attachment, target: Path) -> Iterator[tuple[str, Tensor]]:
    """Key and vectors of each token at each text encoder."""
    method: Any = attachment.method
    names = encoder_names(attachment, target)
    for site, adapter in attachment.parts.values():
        rows: Tensor = adapter.get_parameter("vectors").detach()
        for word, vectors in zip(method.each, rows.split(method.vectors), strict=True):
            yield f"{BUNDLE}{word}.{names[site.name]}", vectors


save = OneTrainer().save
