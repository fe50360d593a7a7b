"""The folder that is uploaded: adapter files, generated images and the model card of a finished run; nothing else."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer import base_models, formats
from veneer.atomic_files import write_atomically
from veneer.hub import RepoName, is_hub_name, parse_name
from veneer.injection.errors import OptionError, VeneerError
from veneer.training.report.png_metadata import SAMPLES

from .adapter_metadata import public_adapter, public_json
from .card import card_text
from .card_data import CardFacts
from .run_files import check_inside
from .run_record import RunRecord

WEIGHTS = {
    "personalize": ("adapter.safetensors", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"),
    "control": ("adapter.safetensors", "diffusers/*.safetensors", "controlnext/*.safetensors"),
    "transfer": ("adapter.safetensors",),
}
CONFIGS = {"personalize": (), "control": ("diffusers/config.json",), "transfer": ("model.json",)}
IMAGES = {
    "personalize": (f"{SAMPLES}/grid.png",),
    "control": (),
    "transfer": ("confusion.png", "average_precision.png", "curves.png"),
}
"""Images beside those that the record lists. Training images are on others (`before_after.png`, `maps.png`,
`sheet.png`, `mistakes.png`), which are not uploaded."""
EXPORTS = {"lora": "kohya", **dict.fromkeys(("dora", "loha", "lokr", "oft", "boft", "glora", "ia3"), "lycoris")}
"""Method -> format that ComfyUI, A1111 and Forge read."""


@dataclass(frozen=True)
class PushOptions:
    """Options of an upload.

    Args:
        repo: name of the repository. `license`: identifier of the license, or None.
    """

    repo: RepoName
    license: str | None = None

    @classmethod
    def of(cls, repo: str, license: str | None) -> PushOptions:
        """Options from the words of the command line.

        Raises:
            OptionError: no name of the form USER/REPO.
        """
        name = parse_name(repo)
        if name is None or name.file is not None or name.revision is not None:
            message = f"push: {repo!r} is no repository; expected USER/REPO, such as user/toy-lora."
            raise OptionError(message, option="repo", method="push", given=repo, expected="USER/REPO")
        return cls(name, license)


def write_folder(run: RunRecord, options: PushOptions, out: Path) -> list[str]:
    """Writes the files to upload to a new or empty folder.

    Returns:
        Their paths below `out`, with the model card first.
    Raises:
        OptionError: `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        message = f"push: {out} is not empty; expected a new folder. Choose another --out, or delete it."
        raise OptionError(message, option="out", method="push", given=str(out), file=out, expected="empty")
    files = _collect(run)
    files |= _export(run, options)
    sizes = {name: len(content) for name, content in files.items()}
    files = {"README.md": card_text(CardFacts(run, str(options.repo), options.license, sizes)).encode(), **files}
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out / name, content)
    return list(files)


def _collect(run: RunRecord) -> dict[str, bytes]:
    """Name in the repository -> content, of the files in the folder of the run.

    Raises:
        VeneerError: a link out of the folder, or a sample that is no PNG file in it.
    """
    found: dict[str, bytes] = {}
    for patterns, read in ((WEIGHTS, public_adapter), (CONFIGS, public_json), (IMAGES, Path.read_bytes)):
        for pattern in patterns[run.kind]:
            for path in sorted(run.folder.glob(pattern)):
                name = path.relative_to(run.folder).as_posix()
                found[name] = read(check_inside(run.folder, name))
    return found | {each["file"]: (run.folder / each["file"]).read_bytes() for each in run.samples}


def _export(run: RunRecord, options: PushOptions) -> dict[str, bytes]:
    """The adapter in the format of ComfyUI, A1111 and Forge, with its token embeddings, if a format can hold it."""
    methods = [each["name"] for each in run.record.get("methods", ()) if each["name"] != "textual_inversion"]
    if run.kind != "personalize" or len(methods) != 1 or methods[0] not in EXPORTS:
        return {}
    name = options.repo.repo.rpartition("/")[2]
    facts: dict[str, Any] = {"title": name, "date": run.date, "base": run.base_label}
    if options.license:
        facts["license"] = options.license
    file = run.folder / "adapter.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = _model_of(run, file)
            formats.convert(model, file, EXPORTS[methods[0]], Path(folder) / f"{name}.safetensors", facts)
        except VeneerError:  # a layer or a base model without a name in the format
            return {}
        return {
            f"comfyui/{path.relative_to(folder)}": public_adapter(path) for path in sorted(Path(folder).rglob("*.safetensors"))
        }


def _model_of(run: RunRecord, file: Path) -> Any:
    """A model with the layers of an adapter: an architecture without weights, else the base model, if it is on this machine.

    Raises:
        BaseModelError: it is not.
    """
    architecture = formats.architecture_of(file)
    if architecture is not None:
        return base_models.architecture(architecture)
    options: dict[str, Any] = {"local_files_only": True} if is_hub_name(run.base) and not Path(run.base).exists() else {}
    return base_models.load(run.base, **options)
