"""Adapter files of a personalization run, and what they say about their origin."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from veneer.base_models import BUNDLED
from veneer.formats import diffusers as diffusers_format
from veneer.formats import embeddings, native
from veneer.hub import is_hub_name

from .. import attach_methods
from ..families import family
from ..fixed_adapters import provenance_of
from ..loop.disk_space import optional, writing
from ..loop.distributed import whole_weights
from ..save_dtype import cast_to
from .personalization_run import PersonalizationRun

ADAPTER = "adapter.safetensors"
"""Name of the native file."""
BASE_SOURCE = "base_source"
"""Key of the metadata that says whether the base model was `local` or of the `hub`; none for a bundled one."""


def write_files(run: PersonalizationRun) -> list[str]:
    """Writes the native file of all methods, and the files that diffusers loads."""
    with whole_weights(run.base), cast_to(run.attached, run.config.save_dtype):
        return _write_files(run)


def _write_files(run: PersonalizationRun) -> list[str]:
    provenance = _provenance(run)
    exported = {**provenance, "base": Path(provenance["base"]).name} if Path(provenance["base"]).exists() else provenance
    with writing(run.out, ADAPTER):
        native.save(run.attached, run.out / ADAPTER, provenance=provenance)
    files = [ADAPTER]
    for attachment in run.attached:
        if attachment.method.name == "textual_inversion":
            name, save = "learned_embeds.safetensors", embeddings.save
        elif attachment.method.name == "lora":
            name, save = "pytorch_lora_weights.safetensors", diffusers_format.save
        else:
            continue
        if optional(run.out, name, functools.partial(save, attachment, run.out / name, exported), run.notes) is not None:
            files.append(name)
    return files


def _provenance(run: PersonalizationRun) -> dict[str, Any]:
    """Origin of the adapters, without a date: equal runs write equal files."""
    scheduler = getattr(run.pipe, "scheduler", None)
    facts: dict[str, Any] = {
        **_base(str(run.config.base)),
        "concept": run.config.concept,
        "class_word": run.config.class_word,
        "resolution": run.config.resolution or family(run.pipe).resolution,
        "photos": len(run.photos),
        "trains_token": any(attach_methods.trains_token_embeddings(a.method) for a in run.attached),
        "prediction_type": scheduler.config.get("prediction_type") if scheduler is not None else None,
    }
    if len(run.concepts) > 1:
        facts["concepts"] = {concept.token: concept.class_word for concept in run.concepts}
    known = {name: value for name, value in facts.items() if value is not None or name == "class_word"}
    return {**known, **provenance_of(run.fixed)}


def _base(name: str) -> dict[str, str]:
    """The base model and its source: a local one by its absolute path, which no reader takes for a name on the hub."""
    if name in BUNDLED:
        return {"base": name}
    if Path(name).exists():
        return {"base": str(Path(name).resolve()), BASE_SOURCE: "local"}
    return {"base": name, BASE_SOURCE: "hub" if is_hub_name(name) else "local"}
