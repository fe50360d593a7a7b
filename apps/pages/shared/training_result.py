"""Results of a training job: metrics in words, and files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.pipelines.convert import ConvertConfig, convert

from veneer.training.report.progress import clock

from ...context import escape_markup
from ...jobs import Job
from ...workspace import Workspace, safe_name
from .html import facts
from .job_view import ADAPTER
from .verdict import read_result

FILES = {
    "adapter.safetensors": "for veneer: the page Generate, and veneer.load; with all settings",
    "pytorch_lora_weights.safetensors": "for diffusers: pipeline.load_lora_weights",
    "learned_embeds.safetensors": "the trigger token, for diffusers and others: pipeline.load_textual_inversion",
}
CONFIG_PURPOSE = "to repeat the run: veneer personalize --config, or Config file and other options on this page"


def result_files(job: Job) -> list[Path]:
    """Result files of a job."""
    return [job.run / name for name in FILES if (job.run / name).exists()]


def summarize(job: Job) -> str:
    """Metrics of a finished job as sentences in Markdown; empty before its end."""
    result = read_result(job)
    if not result:
        return ""
    training, metrics = result.get("training") or {}, result.get("metrics") or {}
    count = sum(int(m.get("parameters", 0)) for m in result.get("methods", []))
    lines = [f"{training.get('steps')} steps in {clock(training.get('seconds') or 0)}; {count:,} trainable parameters."]
    if "verdict" not in result:  # the reasons of a verdict include the metrics
        lines += _similarity(metrics) + _prompt(metrics, result.get("config") or {}) + _drift(metrics)
    lines += [f"Note: {escape_markup(str(warning))}" for warning in training.get("warnings") or []]
    return "\n".join(f"- {line}" for line in lines)


def describe_files(job: Job, config: Sequence[str] = ()) -> str:
    """What each result file is for, in HTML; empty without files. `config`: its config file, if any."""
    pairs = [(_download_name(job, path), FILES[path.name]) for path in result_files(job)]
    pairs += [(Path(path).name, CONFIG_PURPOSE) for path in config if pairs]
    return f"<h3>Files</h3>{facts(pairs)}" if pairs else ""


def _download_name(job: Job, path: Path) -> str:
    """Name of a downloaded file."""
    return f"{safe_name(job.title)}.safetensors" if path.name == ADAPTER else path.name


def _similarity(metrics: Mapping[str, Any]) -> list[str]:
    scores = metrics.get("similarity")
    if not scores:
        return []
    ceiling = metrics.get("ceiling")
    bound = f"; between your photos {ceiling['mean']:.2f}" if ceiling else ""
    return [
        f"Similarity to your photos: **{scores['adapted']['mean']:.2f}** with the adapter, {scores['base']['mean']:.2f} without "
        f"(1 means identical{bound})."
    ]


def _prompt(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    scores = metrics.get("prompt_similarity")
    if not scores:
        return []
    concept, word = (escape_markup(str(config.get(name) or "")) for name in ("concept", "class_word"))
    read = f", with “{word}” for {concept}" if word else ""
    return [
        f"Similarity to the prompt{read}: {scores['adapted']['mean']:.2f} with the adapter, {scores['base']['mean']:.2f} without."
    ]


def _drift(metrics: Mapping[str, Any]) -> list[str]:
    score = metrics.get("drift")
    return [f"Drift, the change in images of other subjects: {score['mean']:.2f} (0 means none)."] if score else []


def export_kohya(workspace: Workspace, name: str) -> list[str]:
    """Exports a job's adapter for ComfyUI and A1111, with a file for its token embedding, whose trigger is the file name.

    Raises:
        VeneerError: unknown job, no adapter yet, or the format does not support it.
    """
    job = workspace.job(name)
    out = Path(tempfile.mkdtemp(prefix="veneer-")) / f"{safe_name(job.title)}-comfyui-a1111.safetensors"
    convert(ConvertConfig(job.run / ADAPTER, "kohya", out=out))
    return [str(path) for path in (out, *sorted(path for path in out.parent.glob("*.safetensors") if path != out))]
