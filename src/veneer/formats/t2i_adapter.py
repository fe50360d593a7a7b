"""T2I-Adapters as diffusers saves them, and as their authors do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.sites import ResidualSite

from ._control.model_folder import WEIGHTS, config_beside, write_folder
from ._control.networks import (
    build_on_meta,
    check_count,
    dimension,
    layers_by_part,
    match_tensors,
    shapes,
    single_attachment,
    unet_of,
)
from ._core.attach import AttachmentSpec, attach_all, build_method
from ._core.format import Format, LayerInfo, Options
from ._core.lora_config import NATIVE
from ._io.reader import File

KIND, PREFIX = "T2IAdapter", "adapter."
MARK = re.compile(r"(?:adapter\.)?body\.\d+\.(?:resnets\.\d+\.|body\.\d+\.)?block1\.weight")
TYPES = {"full": ("full_adapter", "full_adapter_xl"), "light": ("light_adapter",)}  # diffusers' names
DEFAULT_BLOCKS = {"full": 2, "light": 4}  # default number of blocks per level
MAX_CHANNELS = 4  # maximum image channels without a config; more indicate a coarser pixel unshuffle


class T2IAdapter(Format):
    """`adapter.conv_in`, `adapter.body.{level}.in_conv`, `….resnets.{i}.block1`, `….block2`, and `….out_conv` of a light adapter.

    Reads diffusers' folder, also of a variant; the same tensors in one file, with or without `adapter.`; and the authors' names,
    which number the blocks of a full adapter across levels, `body.{i}.block1`, and those of a light one within levels,
    `body.{level}.body.{i}.block1`. Without a config, images have up to four channels.

    Writes the folder that `T2IAdapter.from_pretrained` loads, for a UNet whose levels match one of its three types.
    Source: diffusers 0.42 `models/adapter.py`; TencentARC/T2I-Adapter `ldm/modules/encoders/adapter.py`, `models/adapters.py`.
    """

    name: ClassVar[str] = "t2i_adapter"
    file: ClassVar[str] = WEIGHTS
    order: ClassVar[int] = -1
    folder: ClassVar[bool] = True

    def reads(self, file: File) -> bool:
        return any(MARK.fullmatch(key) for key in file.shapes)

    def layers(self, file: File) -> list[LayerInfo]:
        return layers_by_part(file, self.name, lambda name: ".".join(name.removeprefix(PREFIX).split(".")[:2]))

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        other = next((key for key in file.shapes if ".skep." in key or ".down_opt." in key), None)
        if other is not None:
            raise LoadError(
                f"{file.path}: '{other}' belongs to the authors' first design, with convolutions instead of pooling, which "
                "veneer does not support.",
                file=file.path,
                where=other,
            )
        tower, site = unet_of(model, file, "a T2I-Adapter")
        prefix = PREFIX if any(key.startswith(PREFIX) for key in file.shapes) else ""
        config = config_beside(file, KIND)
        kind = "light" if any(key.endswith(".out_conv.weight") for key in file.shapes) else "full"
        _compare(file, config, kind, site)
        blocks, authors = _blocks(file, prefix, kind, len(site.inner_widths))
        channels = _channels(file, prefix, kind, site, "downscale_factor" in config)
        own = {"kind": kind, "channels": channels, "blocks": 0 if blocks == DEFAULT_BLOCKS[kind] else blocks}
        expected = shapes(build_on_meta(file, lambda: build_method(self.name, own).build(site)))
        names = {name: prefix + (_authors_name(name, kind, blocks) if authors else name) for name in expected}
        found = match_tensors(file, expected, names, tower, options, self.name)
        tensors = file.tensors(finite=options.strict, names=set(found.keys.values()))
        state = {f"{site.name}:{name}": tensors[key] for name, key in found.keys.items()}
        spec = AttachmentSpec(self.name, self.name, own, [site.name], state, unused=found.unused)
        return attach_all(model, file, [spec], options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        attachment = single_attachment(attachments, target, self.name, "a T2I-Adapter's folders")
        method: Any = attachment.method
        ((site, adapter),) = attachment.parts.values()
        assert isinstance(site, ResidualSite)
        kind = type_of(site, method.kind)
        if kind is None:
            raise SaveError(
                f"{target}: levels of widths {site.inner_widths} and strides {site.inner_strides} match none of diffusers' types "
                f"of a {method.kind} T2IAdapter. {NATIVE}",
                file=target,
                given=tuple(site.inner_widths),
            )
        config = {
            "adapter_type": kind,
            "in_channels": method.channels,
            "channels": list(site.inner_widths[:-1] if method.kind == "light" else site.inner_widths),
            "num_res_blocks": method.blocks or DEFAULT_BLOCKS[method.kind],
            "downscale_factor": site.pixels * site.inner_strides[0],
        }
        return write_folder(target, {PREFIX + name: t for name, t in adapter.state_dict().items()}, config, KIND)


def halvings(kind: str, levels: int) -> tuple[int, ...]:
    """Strides of the levels relative to the first, by diffusers' type."""
    return tuple(2 ** (level > 1) if kind == "full_adapter_xl" else 2**level for level in range(levels))


def type_of(site: ResidualSite, kind: str) -> str | None:
    """diffusers' adapter type for a UNet; None if no type matches."""
    widths, levels = site.inner_widths, len(site.inner_widths)
    strides = tuple(stride // site.inner_strides[0] for stride in site.inner_strides)
    if kind == "light":  # its last two levels have the same width
        same = levels > 1 and widths[-1] == widths[-2]
        return "light_adapter" if same and strides == halvings("light_adapter", levels) else None
    if strides == halvings("full_adapter", levels):
        return "full_adapter"
    alike = levels > 2 and len(set(widths[2:])) == 1  # only its second and third level change the width
    return "full_adapter_xl" if alike and strides == halvings("full_adapter_xl", levels) else None


def _compare(file: File, config: Mapping[str, Any], kind: str, site: ResidualSite) -> None:
    """Raises for a config with another downscale factor or other levels than the model's, which the tensors do not show."""
    where = file.path.with_name("config.json")
    first = site.pixels * site.inner_strides[0]
    if config.get("downscale_factor", first) != first:
        raise LoadError(
            f"{where}: downscale_factor={str(config['downscale_factor'])[:40]}, but the model's first level has stride "
            f"{first}. It is for another model family: 8 is for Stable Diffusion 1 and 2, 16 for XL.",
            file=where,
            option="downscale_factor",
            given=config["downscale_factor"],
            expected=first,
        )
    strides = tuple(stride // site.inner_strides[0] for stride in site.inner_strides)
    adapter_type = config.get("adapter_type")
    if adapter_type is not None and (adapter_type not in TYPES[kind] or strides != halvings(adapter_type, len(strides))):
        raise LoadError(
            f"{where}: adapter_type={str(adapter_type)[:40]!r}, but the file holds a {kind} adapter for a model whose levels "
            f"have strides {strides}. It is for another model family.",
            file=where,
            option="adapter_type",
            given=adapter_type,
            expected=kind,
        )


def _blocks(file: File, prefix: str, kind: str, levels: int) -> tuple[int, bool]:
    """Residual blocks per level, and whether they have the authors' names."""
    start = re.escape(prefix)

    def numbers(pattern: str) -> int:
        return len({m[1] for key in file.shapes if (m := re.match(pattern, key))})

    if ours := numbers(rf"{start}body\.0\.resnets\.(\d{{1,6}})\."):
        return check_count(file, ours, "blocks of a level"), False
    light = kind == "light"
    count = numbers(rf"{start}body\.0\.body\.(\d{{1,6}})\." if light else rf"{start}body\.(\d{{1,6}})\.block1\.")
    return check_count(file, max(1, count if light else math.ceil(count / levels)), "blocks of a level"), True


def _channels(file: File, prefix: str, kind: str, site: ResidualSite, confirmed: bool) -> int:
    """Channels of an image.

    Args:
        told: True if a config confirms the downscale factor that the model needs.
    """
    key = f"{prefix}conv_in.weight" if kind == "full" else f"{prefix}body.0.in_conv.weight"
    width, first = dimension(file, key, 1, 4), site.pixels * site.inner_strides[0]
    channels, remainder = divmod(width, first * first)
    if remainder or not channels or (channels > MAX_CHANNELS and not confirmed):
        raise LoadError(
            f"{file.path}: '{key}' reads {width} channels; expected a multiple of {first * first}: pixel unshuffle by {first}, "
            f"as the model needs, gives {first * first} per image channel. It is for another model family: Stable Diffusion 1 "
            "and 2 use 8, XL uses 16.",
            file=file.path,
            where=key,
            given=width,
            expected=first * first,
        )
    return channels


def _authors_name(name: str, kind: str, blocks: int) -> str:
    """The authors' name for one of diffusers' names."""
    if kind == "light":
        return name.replace(".resnets.", ".body.")
    m = re.fullmatch(r"body\.(\d+)\.(?:resnets\.(\d+)\.)?(.*)", name)
    return f"body.{int(m[1]) * blocks + int(m[2] or 0)}.{m[3]}" if m else name


save = T2IAdapter().save
