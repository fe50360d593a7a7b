"""Front matter of a model card, in the words of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from veneer.formats import architecture_of, read
from veneer.formats.native import KEY

from .run_record import RunRecord

FAMILIES = {
    "sd15": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sd21": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sdxl": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "sd3": ("sd3", "sd3-diffusers"),
    "sd35": ("sd3.5", "sd3.5-diffusers"),
    "sd35-large": ("sd3.5-large", "sd3.5-diffusers"),
    "flux": ("flux", "flux-diffusers"),
    "pixart": ("pixart",),
    "dit": ("dit",),
}
"""Architecture -> the tags of diffusers' training scripts."""
NO_LOADER = ("PixArt", "DiT", "HunyuanDiT", "LongCatImage", "HunyuanImage", "OvisImage", "BriaTransformer", "OmniGen")
"""Denoisers whose diffusers pipelines do not load LoRA files."""
TEMPLATE = "template:sd-lora"
"""Tag by which the hub shows a gallery of the widget's images."""
MANIFEST = "veneer_files"
"""Entry that lists the uploaded files, so that a later upload deletes these only."""
LORA_FILE, TOKEN_FILE = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"


@dataclass(frozen=True)
class CardFacts:
    """What a model card is written from.

    Args:
        run: the run. `repo`: name of the repository. `license`: its identifier, or None.
        files: name of every uploaded file -> bytes, without the card.
    """

    run: RunRecord
    repo: str
    license: str | None
    files: Mapping[str, int]

    @property
    def title(self) -> str:
        """Title: the last part of the repository's name."""
        return self.repo.rpartition("/")[2]

    @cached_property
    def architecture(self) -> str | None:
        """Architecture that the layers of the adapter fit; None if unknown, as for a bundled base model."""
        return architecture_of(self.run.folder / "adapter.safetensors")

    @cached_property
    def components(self) -> Mapping[str, str]:
        """Adapted component -> its class, from the metadata of the native file."""
        base = read(self.run.folder / "adapter.safetensors").json(KEY)["base"]
        return {name: str(entry.get("class", "")).rpartition(".")[2] for name, entry in base.items()}

    @property
    def comfyui_file(self) -> str | None:
        """The adapter file for ComfyUI, or None."""
        name = f"comfyui/{self.title}.safetensors"
        return name if name in self.files else None

    @property
    def control_folder(self) -> str | None:
        """Folder with the file of a control adapter for other tools, or None."""
        return next((name.partition("/")[0] for name in self.files if name.startswith(("diffusers/", "controlnext/"))), None)

    @property
    def loads_in_diffusers(self) -> bool:
        """True if a diffusers pipeline loads one of the files: some of its classes have no loader of LoRA."""
        if self.run.kind == "control":
            return self.control_folder == "diffusers"
        has_loader = not any(kind.startswith(NO_LOADER) for kind in self.components.values())
        return bool({LORA_FILE, TOKEN_FILE} & self.files.keys()) and has_loader

    @property
    def image_prompts(self) -> list[tuple[str, str]]:
        """(prompt, file) of the generated images."""
        return [(each["prompt"], each["file"]) for each in self.run.samples if each.get("prompt")]


def front_matter(facts: CardFacts) -> Any:
    """`huggingface_hub.ModelCardData` of a run; entries that are not known are left out.

    `license` is set only if one was passed, and `base_model` only for a base model on the hub.
    """
    from huggingface_hub import EvalResult, ModelCardData

    run = facts.run
    entries: dict[str, Any] = {
        "license": facts.license,
        "base_model": run.hub_base,
        "base_model_relation": "adapter" if run.hub_base else None,
        "library_name": "diffusers" if facts.loads_in_diffusers else "veneer",
        "pipeline_tag": _pipeline_tag(facts),
        "tags": tags(facts),
        MANIFEST: list(facts.files),
    }
    if run.tokens:
        template = (run.config.get("template") or ("{concept}",))[0]
        entries["instance_prompt"] = ", ".join(template.replace("{concept}", token) for token in run.tokens)
    if facts.image_prompts:
        entries["widget"] = [{"text": prompt, "output": {"url": file}} for prompt, file in facts.image_prompts]
    if run.kind == "transfer":
        entries |= {
            "model_name": facts.title,
            "eval_results": [
                EvalResult(
                    task_type="image-classification", dataset_type="image-folder",
                    dataset_name=dataset_label(run), dataset_split="test", metric_type=run.metric[0],
                    metric_value=round(float(run.record[f"test_{run.metric[1]}"]), 4),
                )
            ],
        }  # fmt: skip
    return ModelCardData(**{name: value for name, value in entries.items() if value is not None})


def tags(facts: CardFacts) -> list[str]:
    """Tags: task, library, method, family of the base model, and the hub's gallery template for LoRA."""
    run = facts.run
    if run.kind == "transfer":
        return ["image-classification", *(name.replace("_", "-") for name in run.methods), "veneer"]
    found = ["text-to-image"] if _pipeline_tag(facts) else []
    found += ["diffusers", "diffusers-training"] if facts.loads_in_diffusers else []
    found += [name.replace("_", "-") for name in run.methods]
    found += FAMILIES.get(facts.architecture or "", ())
    found += [TEMPLATE] if LORA_FILE in facts.files and facts.image_prompts else []
    return [*dict.fromkeys(found), "veneer"]


def dataset_label(run: RunRecord) -> str:
    """Name of the training data of a classifier; folders of this machine are not named."""
    data = str(run.config.get("data") or "digits")
    return "scikit-learn digits" if data == "digits" else "own images"


def _pipeline_tag(facts: CardFacts) -> str | None:
    """The hub's name of the task; none for generation from class labels."""
    if facts.run.kind == "transfer":
        return "image-classification"
    return None if any(kind.startswith("DiT") for kind in facts.components.values()) else "text-to-image"
