"""Folders as peft's `save_pretrained` writes them: `adapter_model.safetensors` with `adapter_config.json` beside."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.injection import Attachment, LoadError, SaveError, VeneerError
from veneer.injection.sites import ParamSite, Site, WeightSite
from veneer.injection.towers import Tower, towers_of

from ._core.attach import AttachmentSpec, attach_all
from ._core.format import Format, Options, count_parameters
from ._core.format import LayerInfo as Told
from ._core.lora_config import reject_trained_base
from ._io.reader import File
from ._io.writer import write, write_text
from ._lycoris.codec import SiteTensors
from ._peft.codec import PeftAdapter, PeftCodec, PeftModule, Settings
from ._peft.config import NAME, read_config, reject_unsupported
from ._peft.ia3_vera_glora import GLoRAPeft, IA3Peft, VeRAPeft
from ._peft.low_rank import AdaLoRAPeft, DoRAPeft, LoHaPeft, LoKrPeft, LoRAPeft
from ._peft.oft import BOFTPeft, OFTPeft

CODECS: tuple[PeftCodec, ...] = (
    LoRAPeft(), DoRAPeft(), LoHaPeft(), LoKrPeft(), OFTPeft(), BOFTPeft(), IA3Peft(), VeRAPeft(), GLoRAPeft(),
    AdaLoRAPeft(),
)  # fmt: skip
ROOT = "base_model.model."


class PeftFolder(Format):
    """`base_model.model.{path}.{end}`, with peft's config as JSON beside: LoRA, DoRA, LoHa, LoKr, OFT, BOFT, (IA)³, VeRA, GLoRA.

    `{path}`: the module's own, so that any model is supported; a folder is for one model, in a pipeline for the one that has its
    modules. Key suffixes are defined by the codecs, one per method. Ranks and alphas are in the config, with patterns for
    individual modules. Modules of `modules_to_save` become trained base parameters. Entries that the tensors do not include
    (an initialization that changed the base) or that no method of veneer implements (trained biases, replicated layers, …) are
    rejected by name. `fan_in_fan_out` matters only for GPT-2's `Conv1D`, which no host has.

    Writes a folder; `peft.PeftModel.from_pretrained(model, folder)` computes the same update, or saving is rejected.
    Source: peft 0.21 `utils/save_and_load.py`, `tuners/*/config.py`, `tuners/*/layer.py`.
    """

    name: ClassVar[str] = "peft_folder"
    file: ClassVar[str] = "adapter_model.safetensors"
    order: ClassVar[int] = -1
    folder: ClassVar[bool] = True

    def reads(self, file: File) -> bool:
        is_peft = file.path.name == self.file or file.path.with_name(NAME).is_file()
        flux = (f"{ROOT}double_blocks.", f"{ROOT}single_blocks.")  # Black Forest Labs' names, of the format bfl
        prefixed = any(key.startswith("base_model.") for key in file.shapes)
        return is_peft and prefixed and not any(key.startswith(flux) for key in file.shapes)

    def layers(self, file: File) -> list[Told]:
        config = read_config(file)
        codec = codec_of(file, config)
        found = []
        for path, parts in _group_keys(file, codec)[0].items():
            shapes = {end: file.shapes[key] for end, key in parts.items()}
            rank = codec.rank(shapes)
            found.append(
                Told(
                    path,
                    codec.method,
                    rank,
                    codec.alpha(file, config, path, rank) if rank else None,
                    count_parameters(file, parts.values()),
                )
            )
        return found

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        config = read_config(file)
        reject_unsupported(file.path.with_name(NAME), config)
        return attach_all(model, file, [_spec(model, file, config, options)], options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        if len(attachments) != 1:
            message = f"{target}: the folder holds one attachment; got {len(attachments)}. Save each to its own folder."
            raise SaveError(message, file=target, given=len(attachments), expected=1)
        attachment = attachments[0]
        codec = next((c for c in CODECS if c.method == attachment.method.name), None)
        if codec is None:
            raise SaveError(
                f"{target}: '{attachment.name}' uses {attachment.method.name}; peft folders hold "
                f"{', '.join(c.method for c in CODECS)}. Save it with Attachment.save (native format).",
                file=target,
                where=attachment.name,
                given=attachment.method.name,
                expected=tuple(c.method for c in CODECS),
            )
        reject_trained_base(attachment, target, "peft's folders")
        try:
            parts = list(_adapters(attachment))
            tensors = {f"{ROOT}{p.path}.{end}": t for p in parts for end, t in codec.write(p).items()} | codec.whole(attachment)
            settings = codec.settings(attachment, parts)
        except VeneerError as error:
            raise SaveError.from_error(error, f"{target}: {error}", file=target) from error
        config: Settings = {"peft_type": codec.kind, "task_type": None, "base_model_name_or_path": None, "inference_mode": True}
        config |= {"target_modules": _target_modules(parts), "modules_to_save": None, **settings}
        written = write(target / self.file, tensors, {"format": "pt"})
        write_text(target / NAME, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        return written


def codec_of(file: File, config: Mapping[str, Any]) -> PeftCodec:
    """The codec of a config's method.

    Raises:
        LoadError: the method is not supported.
    """
    kind = str(config.get("peft_type"))
    dora = kind == "LORA" and (config.get("use_dora") or any("lora_magnitude_vector" in key for key in file.shapes))
    found = next((c for c in CODECS if c.kind == kind and (c.method == "dora") == bool(dora)), None)
    if found is None:
        raise LoadError(
            f"{file.path}: peft's {kind} is not supported; supported: {', '.join(dict.fromkeys(c.kind for c in CODECS))}.",
            file=file.path,
            option="peft_type",
            given=kind,
            expected=tuple(dict.fromkeys(c.kind for c in CODECS)),
        )
    return found


# reading


def _group_keys(file: File, codec: PeftCodec) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Path of each module -> its keys by suffix; and the remaining keys."""
    found: dict[str, dict[str, str]] = {}
    rest = []
    for key in file.shapes:
        end = next((e for e in codec.suffixes if key.endswith("." + e)), None)
        if key in codec.shared:
            continue
        if end is None or not key.startswith(ROOT):
            rest.append(key)
        else:
            found.setdefault(key[len(ROOT) : -len(end) - 1], {})[end] = key
    return found, rest


def _spec(model: Any, file: File, config: Settings, options: Options) -> AttachmentSpec:
    """Specification of the attachment that has the file's update at every module.

    Raises:
        LoadError: modules that the model does not have, or misshapen tensors.
    """
    codec = codec_of(file, config)
    grouped, rest = _group_keys(file, codec)
    towers = towers_of(model)
    places = max((_weights_by_path(t) for t in towers), key=lambda found: sum(path in found for path in grouped))
    tensors = file.tensors(finite=options.strict)
    modules = {t.component: t.module for t in towers}
    notes: list[str] = []
    pieces: list[SiteTensors] = []
    unused: list[str] = []
    shared = {key: tensors[key] for key in codec.shared if key in tensors}
    for path, keys in grouped.items():
        if path not in places:
            unused += keys.values()
            continue
        parts = {end: tensors[key] for end, key in keys.items()}
        layer = PeftModule(file, path, *places[path], parts, config, modules, shared, notes)
        try:
            pieces += codec.read(layer)
        except VeneerError as error:
            if isinstance(error, LoadError):
                raise
            raise LoadError.from_error(error, f"{file.path}: {error}", file=file.path) from error
    state = dict(_whole_modules(towers, rest, tensors))
    kept = {key for key, _ in state.values()}
    unused += [key for key in rest if key not in kept]
    if (unused and options.strict) or not pieces:
        raise LoadError(
            f"{file.path}: unused {len(unused)} of {len(file.shapes)} tensors: {', '.join(unused[:8])}. The model has no modules "
            "of these names, or they are of another kind. Load it on the model it was made for, or pass strict=False.",
            file=file.path,
            unused=unused,
        )
    settings = codec.config(pieces)  # may crop shared tensors
    every = {f"{p.site.name}:{name}": t for p in pieces for name, t in p.state.items()}
    every |= {name: tensors[key] for name, (key, _) in state.items()}
    sites, trained = [p.site.name for p in pieces], list(dict.fromkeys(site for _, site in state.values()))
    return AttachmentSpec(codec.method, codec.method, settings, sites, every, train=trained, notes=notes, unused=unused)


def _weights_by_path(tower: Tower) -> dict[str, tuple[WeightSite, Sequence[ParamSite]]]:
    """Every whole weight of a tower and its bias, by module path, with and without the `text_model.` of some transformers."""
    biases: dict[str, list[ParamSite]] = {}
    for site in tower.sites:
        if isinstance(site, ParamSite) and site.param == "bias":
            biases.setdefault(site.path, []).append(site)
    found: dict[str, tuple[WeightSite, Sequence[ParamSite]]] = {}
    for site in tower.sites:
        if isinstance(site, WeightSite) and site.rows is None and site.param == "weight":
            for path in (site.path, site.path.removeprefix("text_model."), f"text_model.{site.path}"):
                found.setdefault(path, (site, biases.get(site.path, ())))
    return found


def _whole_modules(
    towers: Sequence[Tower], keys: Sequence[str], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Saved name -> key and site, of modules that are stored whole."""
    found: dict[tuple[str, str], Site] = {}
    for site in (s for t in towers for s in t.sites):
        if isinstance(site, (WeightSite, ParamSite)) and site.rows is None:
            params = [site.param] if isinstance(site, ParamSite) else ["weight", "bias"]
            for param in params:
                if isinstance(site, WeightSite) or (site.path, param) not in found:
                    found[site.path, param] = site
    for key in keys:
        path, _, param = key.removeprefix(ROOT).rpartition(".")
        path = path.removesuffix(".modules_to_save.default").removesuffix(".modules_to_save")
        if site_ := found.get((path, param)):
            yield f"{site_.name}:{param}", (key, site_.name)


# writing


def _adapters(attachment: Attachment) -> Iterator[PeftAdapter]:
    """Every adapter with its module's path.

    Raises:
        SaveError: adapters on several models, or of a slice of a weight.
    """
    if len({site.component for site, _ in attachment.parts.values()}) > 1:
        message = f"'{attachment.name}' is on {', '.join(attachment.towers)}, but a folder is for one model."
        raise SaveError(message, where=attachment.name, given=tuple(attachment.towers), expected=1)
    for site, adapter in attachment.parts.values():
        path, param = getattr(site, "path", None), getattr(site, "param", None)
        if getattr(site, "rows", None) is not None or param not in ("weight", "bias"):
            raise SaveError(
                f"'{site.name}' is a slice of '{path}', which peft adapts as a whole. Select the whole weight by its role, such "
                "as attn.qkv.",
                where=site.name,
                expected=path,
            )
        yield PeftAdapter(str(path), site, adapter, attachment.towers)


def _target_modules(parts: Sequence[PeftAdapter]) -> list[str] | str:
    """Paths of the modules; a regular expression if peft would match another module by suffix."""
    names = dict.fromkeys(p.path for p in parts)
    tower: nn.Module = parts[0].towers[parts[0].site.component]
    others = (name.split(".") for name, _ in tower.named_modules() if name not in names)
    caught = any(".".join(path[i:]) in names for path in others for i in range(1, len(path)))
    return "|".join(name.replace(".", r"\.") for name in names) if caught else list(names)


save = PeftFolder().save
