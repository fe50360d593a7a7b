"""Base models on the meta device with all components: by the name of an architecture, or from the configs of a folder."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.base_models.architectures import PIPELINES, autoencoder, library_architecture
from veneer.base_models.folders import read_json
from veneer.base_models.loading import find
from veneer.extras import require
from veneer.injection.errors import BaseModelError

from ..families import Family, family


def meta_family(base: str | Path, dtype: torch.dtype) -> Family:
    """The family of a base model whose components are on the meta device, frozen. It needs neither weights nor a network.

    Args:
        base: name of an architecture, `bundled`, or a diffusers folder, of which only the configs are read.
        dtype: of the weights.
    Raises:
        BaseModelError: a base model without configs on this machine: a hub name, a single file or an unknown name.
    """
    require("diffusers", "transformers")
    pipe = _architecture(str(base)) if base in PIPELINES and not Path(base).exists() else _folder(base)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            _cast(part.eval().requires_grad_(False), dtype)
    return family(pipe)


def _architecture(name: str) -> Any:
    import diffusers

    kind, _ = PIPELINES[name]
    is_flow = kind in ("FluxPipeline", "StableDiffusion3Pipeline")
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler() if is_flow else diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    )
    return _assemble(kind, {**library_architecture(name).components, "vae": autoencoder(name), "scheduler": scheduler})


def _folder(base: str | Path) -> Any:
    folder = find(base)
    if isinstance(folder, str) or not folder.is_dir():
        message = (
            f"check: {base} has no configs on this machine; expected the name of an architecture ({', '.join(PIPELINES)}), "
            "'bundled' or a diffusers folder."
        )
        raise BaseModelError(message, where="base", given=str(base), expected=tuple(PIPELINES))
    index = read_json(folder / "model_index.json")
    entries = {
        name: entry for name, entry in index.items() if isinstance(entry, list) and entry[0] in ("diffusers", "transformers")
    }
    with torch.device("meta"):
        parts = {name: _component(folder / name, *entry) for name, entry in entries.items()}
    settings = {name: value for name, value in index.items() if not name.startswith("_") and name not in entries}
    return _assemble(index["_class_name"], parts, {n: v for n, v in settings.items() if v != [None, None]})


def _component(folder: Path, library: str, name: str) -> Any:
    """A model on the meta device or a scheduler; None for tokenizers and other processors."""
    import diffusers
    import transformers

    kind = getattr(diffusers if library == "diffusers" else transformers, name)
    if hasattr(kind, "load_config"):
        with torch.device("meta" if issubclass(kind, nn.Module) else "cpu"):  # some schedulers compute with their tensors
            return kind.from_config(kind.load_config(folder))
    config = getattr(kind, "config_class", None)
    return None if config is None else kind(config.from_pretrained(folder))


def _assemble(kind: str, parts: dict[str, Any], settings: dict[str, Any] | None = None) -> Any:
    """A pipeline of the components; None for those that are missing. `settings`: other arguments of its class."""
    import diffusers

    build = getattr(diffusers, kind)
    parameters = {name: p for name, p in inspect.signature(build.__init__).parameters.items() if name != "self"}
    needed = [name for name, p in parameters.items() if p.default is p.empty]
    given = {name: parts[name] for name in parameters if parts.get(name) is not None}
    own = {name: value for name, value in (settings or {}).items() if name in parameters}
    unsafe = {"requires_safety_checker": False} if "requires_safety_checker" in parameters else {}
    return build(**{**dict.fromkeys(needed), **given, **own, **unsafe})


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts as `from_pretrained` does: in float16 some modules of T5 stay in float32."""
    nn.Module.to(model, dtype)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    for path, module in model.named_modules():
        if kept & set(path.split(".")):
            module.float()
