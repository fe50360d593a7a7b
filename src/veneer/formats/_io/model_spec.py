"""Metadata by which other tools recognize a LoRA file: ModelSpec, and the entries of sd-scripts for title, base and trigger word.

| entry | read by |
|---|---|
| `modelspec.*` | SwarmUI, InvokeAI, ComfyUI's and A1111's model browsers; `modelspec.trigger_phrase` also by veneer |
| `ss_output_name` | A1111 and Forge: the name in `<lora:NAME:1>` |
| `ss_base_model_version` | A1111, Forge and Civitai: the base model |
| `ss_tag_frequency` | A1111, Forge, Civitai and LoRA managers of ComfyUI: training tags, from which they propose trigger words |
| `sshs_model_hash` | A1111, Forge and Civitai: SHA-256 of the tensors, which identifies the file |

A file has no date and no name unless its provenance has them, so that equal weights give equal files.

Source: github.com/Stability-AI/ModelSpec, version 1.0.0; kohya-ss/sd-scripts `library/sai_model_spec.py` and musubi-tuner
`utils/sai_model_spec.py`, whose names of architectures and implementations are used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.injection import Attachment

from .._names.kohya import base_model_version
from .._names.transformers import names_of

SPEC = "1.0.0"
HASHES = {"modelspec.hash_sha256": "0x", "sshs_model_hash": ""}
"""Entries with the SHA-256 of the tensors -> its prefix; see `serialize`."""
COMFYUI = "https://github.com/comfyanonymous/ComfyUI"
DIFFUSERS = "diffusers"
SD_SCRIPTS = {
    "sdxl_base_v1-0": "https://github.com/Stability-AI/generative-models",
    "flux1": "https://github.com/black-forest-labs/flux",
}
"""Implementation that sd-scripts names for a base model version; `diffusers` for others."""
RESOLUTIONS = {"stable-diffusion-v1": 512, "stable-diffusion-v2-512": 512, "stable-diffusion-v2-768-v": 768}
"""Resolution by architecture; 1024 for others."""
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def model_spec(
    attachments: Sequence[Attachment], provenance: Mapping[str, Any] | None, implementation: str | None = None
) -> dict[str, str]:
    """Metadata of a LoRA file.

    Args:
        attachments: what is saved.
        provenance: over that of the attachments; used are `title`, `concept`, `base`, `resolution`, `prediction_type`,
            `photos` (number of training images), `trains_token` (a token embedding belongs to the adapter), `license`, `date`
            and `merged`.
        implementation: whose names the tensors have (default: the one that sd-scripts names).
    Returns:
        The entries; without `modelspec.sai_model_spec` and the entries that it requires if the architecture is unknown.
    """
    facts = {k: v for a in attachments for k, v in a.provenance.items()} | dict(provenance or {})
    towers = [tower for a in attachments for tower in a.towers.values()]
    versions = {version for tower in towers if (version := base_model_version(tower))}
    architecture = next((name for tower in towers if (name := architecture_id(tower, facts.get("prediction_type")))), None)
    phrase = (
        "" if facts.get("merged") else str(facts.get("concept") or "").strip()
    )  # of several files, one would be an arbitrary one
    if implementation != DIFFUSERS and facts.get("trains_token"):
        phrase = phrase.strip("<>")  # elsewhere, the trigger of a token embedding is its file name
    title = str(facts.get("title") or f"{phrase.strip('<>')} LoRA".strip())
    entries: dict[str, str] = {}
    if architecture:
        entries["modelspec.sai_model_spec"] = SPEC
        entries["modelspec.architecture"] = f"{architecture}/lora"
        entries["modelspec.implementation"] = implementation or SD_SCRIPTS.get(next(iter(versions), ""), DIFFUSERS)
        entries["modelspec.title"] = title
        side = facts.get("resolution") or RESOLUTIONS.get(architecture, 1024)
        entries["modelspec.resolution"] = f"{side}x{side}"
    prediction = PREDICTIONS.get(str(facts.get("prediction_type")))
    optional = {
        "trigger_phrase": phrase,
        "usage_hint": f"Trigger word: {phrase}" if phrase else "",
        "prediction_type": prediction,
        "date": facts.get("date"),
        "license": facts.get("license"),
        "merged_from": ", ".join(map(str, facts.get("merged") or ())),
    }
    entries |= {f"modelspec.{key}": str(value) for key, value in optional.items() if value}
    return entries | _sd_scripts_entries(facts, title, phrase, versions)


def _sd_scripts_entries(facts: Mapping[str, Any], title: str, phrase: str, versions: set[str]) -> dict[str, str]:
    photos = facts.get("photos")
    count = photos if isinstance(photos, int) else 1
    entries = {"ss_output_name": title} if facts.get("title") else {}  # without it, tools use the file name
    if len(versions) == 1:
        version = next(iter(versions))
        entries |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    if facts.get("base"):
        entries["ss_sd_model_name"] = Path(str(facts["base"])).name
    if facts.get("resolution"):
        entries["ss_resolution"] = f"({facts['resolution']}, {facts['resolution']})"
    if isinstance(photos, int):
        entries["ss_num_train_images"] = str(photos)
    if phrase:
        entries["ss_tag_frequency"] = json.dumps({title: {phrase: count}}, ensure_ascii=False)
    return entries


def architecture_id(tower: Any, prediction: object = None) -> str | None:
    """The architecture of a denoiser, as sd-scripts and ModelSpec name it; None for another model.

    Args:
        prediction: `prediction_type` of the scheduler, which tells the two kinds of Stable Diffusion 2 apart (default: by size).
    """
    config: Any = getattr(tower, "config", {})
    version = base_model_version(tower)
    if version == "sd_v2":
        is_v = prediction == "v_prediction" or (prediction is None and config.get("sample_size") == 96)
        return "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    if (record := names_of(tower)) is not None:
        return record.model_spec(config)
    return {"sd_v1": "stable-diffusion-v1", "sdxl_base_v1-0": "stable-diffusion-xl-v1-base"}.get(version or "")
