"""Finished runs on small models, for the tests of uploads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from veneer.pipelines.control import ControlConfig, control
from veneer.pipelines.personalize import PersonalizeConfig, personalize
from veneer.pipelines.transfer import transfer

from tests.classification.small import image_folder, model_folder
from tests.methods.controls import picture
from tests.training.images import save
from veneer.classification.config import TransferConfig
from veneer.testing.pipelines import tiny_pipeline

SECRET = "private-folder"
"""Part of every path of these runs: it must not be uploaded."""


def base_files(folder: Path) -> dict[str, bytes]:
    """The files of a small Stable Diffusion pipeline, for a repository. From a local folder, it samples in three steps."""
    tiny_pipeline("sd").save_pretrained(folder)
    (folder / "veneer.json").write_text('{"steps": 3}')
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def personalization(folder: Path, base: str, **settings: Any) -> Path:
    """A run of `personalize` on three photos."""
    photos = folder / SECRET / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        save(photos / f"{i}.png", 48, 40, seed=i)
    defaults: dict[str, Any] = {
        "steps": 1, "eval_seeds": 1, "tracker": "none", "prompts": ("a {concept}", "a {concept} | at night"), "class_word": "cat",
        "features": "bundled",
        "template": ("a photo of {concept}",), "drift_prompts": ("a dog",), "concept": "<toy>", "photos": photos,
    }  # fmt: skip
    if settings.get("eval") == "none":
        del defaults["eval_seeds"]
    return personalize(PersonalizeConfig(base=base, out=folder / SECRET / "run", **{**defaults, **settings}))


def control_run(folder: Path, base: str, method: str = "controlnet") -> Path:
    """A run of `control train` on six photos."""
    photos = folder / SECRET / "photos"
    photos.mkdir(parents=True)
    for i in range(6):
        picture(i, 32).save(photos / f"{i}.png")
    config = ControlConfig(
        data=photos, base=base, out=folder / SECRET / "run", method=method, steps=2, batch=2, tracker="none", template="a thing",
        validation=0.34, grid_images=2, preview_every=0, eval_seeds=1,
    )  # fmt: skip
    return control(config)


def classification(folder: Path) -> Path:
    """A run of `transfer` on three colors."""
    images, model = image_folder(folder / SECRET / "images", count=16), model_folder(folder / SECRET / "models", "vit")
    config = TransferConfig(
        data=str(images), model=str(model), out=folder / SECRET / "run", epochs=2, batch=8, augment="none", workers=1, test=0.25
    )
    return transfer(config)


def set_provenance(file: Path, **entries: Any) -> None:
    """Changes entries of the provenance in the metadata of a native file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    own = json.loads(header["__metadata__"]["veneer"])
    own["provenance"] |= entries
    header["__metadata__"]["veneer"] = json.dumps(own)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def on_hub(folder: Path, base: str = "owner/tiny") -> Path:
    """The run, as if its base model were on the hub."""
    record = json.loads((folder / "result.json").read_text())
    record["config"]["base"] = base
    (folder / "result.json").write_text(json.dumps(record))
    set_provenance(folder / "adapter.safetensors", base=base, base_source="local" if Path(base).exists() else "hub")
    return folder
