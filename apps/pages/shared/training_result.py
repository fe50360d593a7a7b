"""What came of a teaching job: its figures in plain words, and its files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.training.report.progress import clock

from ...context import escaped
from ...jobs import Job
from ...workspace import Workspace, safe
from .job_view import ADAPTER
from .verdict import read_result

FILES = {
    "adapter.safetensors": "for veneer, with all settings",
    "pytorch_lora_weights.safetensors": "for diffusers",
    "learned_embeds.safetensors": "the new word, for diffusers and others",
}


def files(job: Job) -> list[Path]:
    """What a job has to give."""
    return [job.run / name for name in FILES if (job.run / name).exists()]


def in_words(job: Job) -> str:
    """Figures of a job in sentences, in Markdown; nothing before its end."""
    result = read_result(job)
    if not result:
        return ""
    training, figures = result.get("training") or {}, result.get("figures") or {}
    values = sum(int(m.get("parameters", 0)) for m in result.get("methods", []))
    lines = [f"{training.get('steps')} steps in {clock(training.get('seconds') or 0)}; {values:,} trained parameters."]
    if "verdict" not in result:  # whose reasons have the scores
        lines += _likeness(figures) + _prompt(figures, result.get("config") or {}) + _drift(figures)
    lines += [f"Note: {escaped(str(said))}" for said in training.get("warnings") or []]
    names = [f"{escaped(_named(job, path))} ({FILES[path.name]})" for path in files(job)]
    return "\n".join(f"- {line}" for line in [*lines, f"Files: {', '.join(names)}."])


def _named(job: Job, path: Path) -> str:
    """What a file is called when it is downloaded."""
    return f"{safe(job.title)}.safetensors" if path.name == ADAPTER else path.name


def _likeness(figures: Mapping[str, Any]) -> list[str]:
    found = figures.get("likeness")
    if not found:
        return []
    most = figures.get("ceiling")
    bound = f"; your photos to one another {most['mean']:.2f}" if most else ""
    return [
        f"Likeness to your photos: **{found['adapted']['mean']:.2f}** with what was learnt, {found['base']['mean']:.2f} without "
        f"(1 is the same{bound})."
    ]


def _prompt(figures: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    found = figures.get("prompt_likeness")
    if not found:
        return []
    concept, word = (escaped(str(config.get(name) or "")) for name in ("concept", "class_word"))
    read = f", read with “{word}” for {concept}" if word else ""
    return [f"Likeness to the prompt{read}: {found['adapted']['mean']:.2f} with, {found['base']['mean']:.2f} without."]


def _drift(figures: Mapping[str, Any]) -> list[str]:
    found = figures.get("drift")
    return [f"Change of pictures of other things: {found['mean']:.2f} (0 is none)."] if found else []


def for_others(workspace: Workspace, name: str) -> list[str]:
    """A job's file for ComfyUI and A1111, in a fresh folder, and that of its word, whose name there is the file's name.

    Raises:
        VeneerError: there is no such job, it has no file yet, or that format cannot hold it.
    """
    from veneer.pipelines.convert import ConvertConfig, convert  # it brings diffusers, which takes long to import

    job = workspace.job(name)
    out = Path(tempfile.mkdtemp(prefix="veneer-")) / f"{safe(job.title)}-comfyui-a1111.safetensors"
    convert(ConvertConfig(job.run / ADAPTER, "kohya", out=out))
    return [str(path) for path in (out, *sorted(path for path in out.parent.glob("*.safetensors") if path != out))]
