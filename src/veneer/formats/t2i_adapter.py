"""T2I-Adapters as diffusers saves them, and as their authors do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.sites import ResidualSite

from ._control.model_folder import WEIGHTS, config_beside, folder_of, write_folder
from ._control.networks import drafted, few, fit, parts, shapes, side, single, unet_of
from ._core.attach import Wanted, attach_all, method_of
from ._core.format import Format, Layer, Options
from ._core.lora_config import NATIVE
from ._io.reader import File

KIND, PREFIX = "T2IAdapter", "adapter."
MARK = re.compile(r"(?:adapter\.)?body\.\d+\.(?:resnets\.\d+\.|body\.\d+\.)?block1\.weight")
TYPES = {"full": ("full_adapter", "full_adapter_xl"), "light": ("light_adapter",)}  # diffusers' names of them
USUAL = {"full": 2, "light": 4}  # blocks of a level
MOST_CHANNELS = 4  # of a picture, where only a width tells: more are those of a coarser unshuffling


class T2IAdapter(Format):
    """`adapter.conv_in`, `adapter.body.{level}.in_conv`, `….resnets.{i}.block1`, `….block2`, and `….out_conv` where it is light.

    Read: diffusers' folder, also of a variant; the same tensors in one file, with or without `adapter.`; and the authors' names,
    in which the blocks of all levels of a full one are counted through, `body.{i}.block1`, and those of a light one are
    `body.{level}.body.{i}.block1`. Without a config, pictures have up to four channels.

    Written: the folder that `T2IAdapter.from_pretrained` loads, for a UNet whose levels are those of one of its three types.
    Source: diffusers 0.42 `models/adapter.py`; TencentARC/T2I-Adapter `ldm/modules/encoders/adapter.py`, `models/adapters.py`.
    """

    name: ClassVar[str] = "t2i_adapter"
    file: ClassVar[str] = WEIGHTS
    order: ClassVar[int] = -1
    folder: ClassVar[bool] = True

    def place(self, path: str | PathLike[str]) -> Path:
        return folder_of(Path(path))

    def reads(self, file: File) -> bool:
        return any(MARK.fullmatch(key) for key in file.shapes)

    def layers(self, file: File) -> list[Layer]:
        return parts(file, self.name, lambda name: ".".join(name.removeprefix(PREFIX).split(".")[:2]))

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        other = next((key for key in file.shapes if ".skep." in key or ".down_opt." in key), None)
        if other is not None:
            raise LoadError(
                f"{file.path}: '{other}' is of the authors' first design, with convolutions where later ones pool. No method "
                "here is that network.",
                file=file.path,
                where=other,
            )
        tower, site = unet_of(model, file, "a T2I-Adapter")
        prefix = PREFIX if any(key.startswith(PREFIX) for key in file.shapes) else ""
        config = config_beside(file, KIND)
        kind = "light" if any(key.endswith(".out_conv.weight") for key in file.shapes) else "full"
        _compare(file, config, kind, site)
        blocks, theirs = _blocks(file, prefix, kind, len(site.inner_widths))
        channels = _channels(file, prefix, kind, site, "downscale_factor" in config)
        own = {"kind": kind, "channels": channels, "blocks": 0 if blocks == USUAL[kind] else blocks}
        expected = shapes(drafted(file, lambda: method_of(self.name, own).build(site)))
        names = {name: prefix + (_theirs(name, kind, blocks) if theirs else name) for name in expected}
        found = fit(file, expected, names, tower, options, self.name)
        tensors = file.tensors(finite=options.strict, names=set(found.keys.values()))
        state = {f"{site.name}:{name}": tensors[key] for name, key in found.keys.items()}
        wanted = Wanted(self.name, self.name, own, [site.name], state, unused=found.unused)
        return attach_all(model, file, [wanted], options)

    def save(
        self,
        attachments: Attachment | Sequence[Attachment],
        path: str | PathLike[str],
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        folder = self.place(path)
        attachment = single(attachments, folder, self.name, "a T2I-Adapter's folders")
        method: Any = attachment.method
        ((site, adapter),) = attachment.parts.values()
        assert isinstance(site, ResidualSite)
        kind = type_of(site, method.kind)
        if kind is None:
            raise SaveError(
                f"{folder}: levels {site.inner_widths} wide at {site.inner_strides} of the latent are those of none of "
                f"diffusers' types of a {method.kind} T2IAdapter. {NATIVE}",
                file=folder,
                given=tuple(site.inner_widths),
            )
        config = {
            "adapter_type": kind,
            "in_channels": method.channels,
            "channels": list(site.inner_widths[:-1] if method.kind == "light" else site.inner_widths),
            "num_res_blocks": method.blocks or USUAL[method.kind],
            "downscale_factor": site.pixels * site.inner_strides[0],
        }
        return write_folder(folder, {PREFIX + name: t for name, t in adapter.state_dict().items()}, config, KIND)


def halvings(kind: str, levels: int) -> tuple[int, ...]:
    """Strides of the levels against the first, by diffusers' type."""
    return tuple(2 ** (level > 1) if kind == "full_adapter_xl" else 2**level for level in range(levels))


def type_of(site: ResidualSite, kind: str) -> str | None:
    """diffusers' type of an adapter for a UNet; None if there is none."""
    widths, levels = site.inner_widths, len(site.inner_widths)
    strides = tuple(stride // site.inner_strides[0] for stride in site.inner_strides)
    if kind == "light":  # its last two levels are of one width
        same = levels > 1 and widths[-1] == widths[-2]
        return "light_adapter" if same and strides == halvings("light_adapter", levels) else None
    if strides == halvings("full_adapter", levels):
        return "full_adapter"
    alike = levels > 2 and len(set(widths[2:])) == 1  # only its second and third level change the width
    return "full_adapter_xl" if alike and strides == halvings("full_adapter_xl", levels) else None


def _compare(file: File, config: Mapping[str, Any], kind: str, site: ResidualSite) -> None:
    """Raise for a config of another unshuffling or other levels than the model's, which tensors do not show."""
    where = file.path.with_name("config.json")
    first = site.pixels * site.inner_strides[0]
    if config.get("downscale_factor", first) != first:
        raise LoadError(
            f"{where}: downscale_factor={str(config['downscale_factor'])[:40]}, and the model's first level is reduced by "
            f"{first}. It is for another family of models: 8 is for Stable Diffusion 1 and 2, 16 for XL.",
            file=where,
            option="downscale_factor",
            given=config["downscale_factor"],
            expected=first,
        )
    strides = tuple(stride // site.inner_strides[0] for stride in site.inner_strides)
    named = config.get("adapter_type")
    if named is not None and (named not in TYPES[kind] or strides != halvings(named, len(strides))):
        raise LoadError(
            f"{where}: adapter_type={str(named)[:40]!r}, and the file holds a {kind} one for a model whose levels are reduced by "
            f"{strides}. It is for another family of models.",
            file=where,
            option="adapter_type",
            given=named,
            expected=kind,
        )


def _blocks(file: File, prefix: str, kind: str, levels: int) -> tuple[int, bool]:
    """Residual blocks of a level, and whether they have the authors' names."""
    start = re.escape(prefix)

    def numbers(pattern: str) -> int:
        return len({m[1] for key in file.shapes if (m := re.match(pattern, key))})

    if ours := numbers(rf"{start}body\.0\.resnets\.(\d{{1,6}})\."):
        return few(file, ours, "blocks of a level"), False
    light = kind == "light"
    count = numbers(rf"{start}body\.0\.body\.(\d{{1,6}})\." if light else rf"{start}body\.(\d{{1,6}})\.block1\.")
    return few(file, max(1, count if light else math.ceil(count / levels)), "blocks of a level"), True


def _channels(file: File, prefix: str, kind: str, site: ResidualSite, told: bool) -> int:
    """Channels of a picture.

    Args:
        told: True if a config agrees that the pictures are unshuffled as the model needs.
    """
    key = f"{prefix}conv_in.weight" if kind == "full" else f"{prefix}body.0.in_conv.weight"
    width, first = side(file, key, 1, 4), site.pixels * site.inner_strides[0]
    channels, left = divmod(width, first * first)
    if left or not channels or (channels > MOST_CHANNELS and not told):
        raise LoadError(
            f"{file.path}: '{key}' reads {width} channels; pictures unshuffled by {first}, as the model needs, have "
            f"{first * first} for each of their own. It is for another family of models: Stable Diffusion 1 and 2 have 8, XL has "
            "16.",
            file=file.path,
            where=key,
            given=width,
            expected=first * first,
        )
    return channels


def _theirs(name: str, kind: str, blocks: int) -> str:
    """The authors' name for one of ours."""
    if kind == "light":
        return name.replace(".resnets.", ".body.")
    m = re.fullmatch(r"body\.(\d+)\.(?:resnets\.(\d+)\.)?(.*)", name)
    return f"body.{int(m[1]) * blocks + int(m[2] or 0)}.{m[3]}" if m else name


save = T2IAdapter().save
