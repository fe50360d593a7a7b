"""ControlNets as diffusers saves them, in a folder or one file, and as their authors do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from veneer.injection import Attachment, LoadError

from ._control.model_folder import WEIGHTS, config_beside, write_folder
from ._control.networks import (
    build_on_meta,
    dimension,
    layers_by_part,
    match_tensors,
    network_name,
    shapes,
    single_attachment,
    unet_of,
)
from ._core.attach import AttachmentSpec, attach_all, build_method
from ._core.format import Format, LayerInfo, Options
from ._io.reader import File
from ._names.ldm import ldm_names

KIND = "ControlNetModel"
HINT, LDM_HINT = "controlnet_cond_embedding", "input_hint_block"
PREFIX = "control_model."  # in the authors' files
MARK = re.compile(rf"(?:{re.escape(PREFIX)})?{LDM_HINT}\.0\.weight|{HINT}\.conv_in\.weight")
# other networks with a hint encoder of the same name, by keys that only they have
OTHERS = {
    r"lora_controlnet": "a Control-LoRA, which holds low-rank updates of the UNet's own weights",
    r"task_embedding|control_add_embedding\.": "a ControlNet Union, which also takes the type of control image",
    r"(?:double|single)_blocks\.|controlnet_blocks\.|controlnet_x_embedder\.": "a ControlNet for a transformer (FLUX, SD3)",
    r"motion_modules\.": "a SparseCtrl, for videos",
    r"(?:down|up)_blocks\.\d+\.ctrl_|base_to_ctrl|ctrl_to_base": "a ControlNet-XS, which runs in step with the UNet",
    r"difference$": "a difference from Stable Diffusion 1.5: add the UNet's encoder to it first",
}
# config entries that do not affect the function, or are derived from the tensors
FREE = ("upcast_attention", "conditioning_channels", "conditioning_embedding_out_channels")
ORDER, POOLED = "controlnet_conditioning_channel_order", "global_pool_conditions"


class ControlNet(Format):
    """A copy of the UNet's encoder under its own names, `controlnet_cond_embedding.*` and the 1×1 `controlnet_down_blocks.{i}`,
    `controlnet_mid_block`.

    Reads diffusers' folder, also of a variant; the same tensors in one file; and the authors' names, with or without
    `control_model.`: `input_blocks.{i}`, `middle_block.{i}`, `input_hint_block.{i}`, `zero_convs.{i}.0`, `middle_block_out.0`.
    Image channels and the hint encoder's widths are derived from the tensors, all else from the model; a config must agree with
    it. A config's `bgr` order is folded into the first convolution.

    Writes the folder that `ControlNetModel.from_pretrained` loads.
    Source: diffusers 0.42 `models/controlnets/controlnet.py`; lllyasviel/ControlNet `cldm/cldm.py`.
    """

    name: ClassVar[str] = "controlnet"
    file: ClassVar[str] = WEIGHTS
    order: ClassVar[int] = -1
    folder: ClassVar[bool] = True

    def reads(self, file: File) -> bool:
        return any(MARK.fullmatch(key) for key in file.shapes)

    def layers(self, file: File) -> list[LayerInfo]:
        return layers_by_part(file, self.name, _part)

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        _reject_other_networks(file)
        tower, site = unet_of(model, file, "a ControlNet")
        config, prefix = config_beside(file, KIND), _prefix(file)
        channels, hint = _hint(file, prefix)
        own = {"channels": channels, "hint": list(hint)}
        adapter: Any = build_on_meta(file, lambda: build_method(self.name, own).build(site))
        notes, expected = list(_compare(file, config, adapter.net.config, options)), shapes(adapter)
        names = {key.removeprefix("net."): key for key in expected}
        ldm = ldm_names(names) if prefix is not None else {key: key for key in names}
        found = match_tensors(
            file, expected, {names[n]: (prefix or "") + key for n, key in ldm.items()}, tower, options, self.name
        )
        tensors = file.tensors(finite=options.strict, names=set(found.keys.values()))
        state = {f"{site.name}:{own_name}": tensors[key] for own_name, key in found.keys.items()}
        if config.get(ORDER, "rgb") != "rgb":
            first = f"{site.name}:net.{HINT}.conv_in.weight"
            state = {name: t.flip(1) if name == first else t for name, t in state.items()}
        spec = AttachmentSpec(self.name, self.name, own, [site.name], state, notes=notes, unused=found.unused)
        return attach_all(model, file, [spec], options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        attachment = single_attachment(attachments, target, self.name, "a ControlNet's folders")
        ((_, adapter),) = attachment.parts.values()
        net: Any = adapter.net
        tensors: dict[str, Tensor] = net.state_dict()
        config = {key: value for key, value in net.config.items() if not key.startswith("_")}
        return write_folder(target, tensors, config, KIND)


def _part(name: str) -> str:
    """Part of the network that contains a module: the block, or the first component of its name."""
    name = name.removeprefix(PREFIX)
    block = re.match(r"(?:down_blocks|input_blocks)\.\d+", name)
    return block[0] if block else name.partition(".")[0]


def _reject_other_networks(file: File) -> None:
    for mark, what in OTHERS.items():
        key = next((key for key in file.shapes if re.search(mark, key)), None)
        if key is not None:
            message = f"{file.path}: '{key}' indicates {what}, which veneer does not support."
            raise LoadError(message, file=file.path, where=key, given=network_name(what))


def _prefix(file: File) -> str | None:
    """Prefix of the authors' names; None for diffusers' names."""
    return next((p for p in (PREFIX, "") if f"{p}{LDM_HINT}.0.weight" in file.shapes), None)


def _hint(file: File, prefix: str | None) -> tuple[int, tuple[int, ...]]:
    """Image channels, and the widths of the hint encoder's stages.

    Raises:
        LoadError: its convolutions are missing or misshapen.
    """
    start = re.escape(f"{HINT}.blocks." if prefix is None else f"{prefix}{LDM_HINT}.")
    numbers = sorted(int(m[1]) for key in file.shapes if (m := re.fullmatch(rf"{start}(\d{{1,6}})\.weight", key)))
    if prefix is None:
        inner, first = [f"{HINT}.blocks.{n}.weight" for n in numbers], f"{HINT}.conv_in.weight"
    else:
        inner, first = [f"{prefix}{LDM_HINT}.{n}.weight" for n in numbers[1:-1]], f"{prefix}{LDM_HINT}.0.weight"
    widths = [dimension(file, key, 0, 4) for key in (first, *inner[1::2])]
    return dimension(file, first, 1, 4), tuple(widths)


def _compare(file: File, config: Mapping[str, Any], net: Mapping[str, Any], options: Options) -> Iterator[str]:
    """Remarks on a config; it must describe the encoder of the model's UNet.

    Raises:
        LoadError: it describes another network, or one that averages its features.
    """
    where = file.path.with_name("config.json")
    if config.get(POOLED):
        message = f"{where}: {POOLED} averages the features over the image, which controlnet does not support."
        raise LoadError(message, file=where, option=POOLED, given=config[POOLED])
    order = config.get(ORDER, "rgb")
    if order not in ("rgb", "bgr"):
        message = f"{where}: {ORDER} is {str(order)[:40]!r}; expected 'rgb' or 'bgr'."
        raise LoadError(message, file=where, option=ORDER, given=order, expected=("rgb", "bgr"))
    if order == "bgr":
        yield "its images have the channel order BGR, which was folded into the first convolution"
    blocks = len(net["block_out_channels"])
    values = {key: value for key, value in config.items() if key in net and not key.startswith("_") and key not in (*FREE, ORDER)}
    other = [k for k, v in values.items() if _per_block(v, blocks) != _per_block(net[k], blocks)]
    if other:
        text = ", ".join(f"{key}={str(values[key])[:80]} (the model: {net[key]})" for key in other[:4])
        if options.strict:
            message = f"{where}: {text}. It is a copy of another UNet's encoder. Load it on the base model it was made for."
            raise LoadError(message, file=where, option=other[0], given=values[other[0]], expected=net[other[0]])
        yield f"its config differs: {text}"


def _per_block(value: Any, blocks: int) -> Any:
    """A value as a list with one entry per block; distinguishes true from 1."""
    several = list(value) if isinstance(value, (list, tuple)) else [value] * blocks
    return [(isinstance(one, bool), one) for one in several]


save = ControlNet().save
