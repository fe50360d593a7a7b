"""The record of a finished run: its kind, settings, results and generated images."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from veneer.base_models import BUNDLED, current_name
from veneer.formats import read
from veneer.formats.native import KEY
from veneer.hub import is_hub_name
from veneer.injection.errors import VeneerError
from veneer.training.evaluation.adapter_output import BASE_SOURCE
from veneer.training.fixed_adapters import RECORD, FixedAdapter

from .hub_origin import is_public_name, public_file
from .run_files import sample_records

Kind = Literal["personalize", "control", "transfer"]
COMMANDS: dict[Kind, str] = {"personalize": "personalize", "control": "control train", "transfer": "transfer"}
RESULT = "result.json"


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Args:
        folder: of the run. `kind`: the command that trained. `record`: content of `result.json`.
    """

    folder: Path
    kind: Kind
    record: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        """The completed configuration."""
        found: Mapping[str, Any] = self.record["config"]
        return found

    @property
    def base(self) -> str:
        """The base model, as it was given."""
        return current_name(str(self.config["model" if self.kind == "transfer" else "base"]))

    @cached_property
    def provenance(self) -> Mapping[str, Any]:
        """Origin of the adapter, from the metadata of its native file."""
        file = read(self.folder / "adapter.safetensors")
        return file.json(KEY).get("provenance", {}) if KEY in file.metadata else {}

    @property
    def fixed_adapters(self) -> list[FixedAdapter]:
        """Adapters that the run was trained on top of, by file name or hub name."""
        records = self.provenance.get(RECORD, ())
        return [FixedAdapter(Path(public_file(str(r["file"]))), float(r["scale"]), str(r["sha256"])) for r in records]

    @property
    def hub_base(self) -> str | None:
        """Name of the base model on the hub; None for a bundled or local one, and for one that may be local."""
        if self.kind == "transfer":
            return None if self.config.get("weights") else _timm_repository(self.base)
        recorded = self.provenance.get("base")
        is_path = recorded is not None and Path(str(recorded)).is_absolute()
        return self.base if not is_path and is_public_name(self.base, self.provenance.get(BASE_SOURCE)) else None

    @property
    def is_bundled(self) -> bool:
        """True if the base model is bundled with veneer."""
        return self.base in BUNDLED

    @property
    def base_label(self) -> str:
        """Name of the base model without local folders."""
        return self.hub_base or Path(self.base).name

    @property
    def concept(self) -> str:
        """Trigger token of a personalization, or ""; the first one of several concepts."""
        return str(self.config.get("concept") or "")

    @property
    def concepts(self) -> Sequence[Mapping[str, Any]]:
        """Records of the concepts of a personalization: `token`, `class_word` and, if there are several, their `metrics`."""
        if self.kind != "personalize" or not self.concept:
            return []
        own = {"token": self.concept, "class_word": self.config.get("class_word"), "metrics": self.record.get("metrics")}
        return self.record.get("concepts") or [own]

    @property
    def tokens(self) -> list[str]:
        """Trigger tokens of a personalization."""
        return [str(each["token"]) for each in self.concepts]

    @property
    def metric(self) -> tuple[str, str]:
        """Name of the metric of a classifier, and the end of its keys in the record."""
        return ("mean average precision", "map") if "test_map" in self.record else ("accuracy", "accuracy")

    @property
    def method(self) -> str:
        """Methods, joined by `+`."""
        return str(self.config["method"])

    @property
    def methods(self) -> list[str]:
        """Names of the methods; of a shorthand such as `pivotal`, those that it stands for."""
        return [each["name"] for each in self.record.get("methods", ())] or self.method.split("+")

    @property
    def samples(self) -> list[Mapping[str, Any]]:
        """Records of the generated images whose files exist.

        Raises:
            VeneerError: a record that names no PNG file inside the folder.
        """
        return list(sample_records(self.folder, self.record))

    @property
    def date(self) -> str:
        """Day on which the run finished (ISO 8601, UTC), by the time of its `result.json`."""
        seconds = (self.folder / RESULT).stat().st_mtime
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).date().isoformat()


def read_run(folder: Path) -> RunRecord:
    """Reads the record of a finished run of `personalize`, `control train` or `transfer`.

    Raises:
        VeneerError: no such folder, an unfinished run, or a folder of another command.
    """
    file = folder / RESULT
    if not folder.is_dir():
        message = f"{folder}: no such folder; expected the folder of a finished run. Check the path."
        raise VeneerError(message, file=folder, where="run", given="missing", expected=RESULT)
    if not file.is_file():
        message = (
            f"{folder}: no {RESULT}: the run is not finished, or the folder is not that of a run. Finish it with --resume --out "
            f"{folder}, and push it then."
        )
        raise VeneerError(message, file=folder, where=RESULT, given="unfinished", expected=RESULT)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VeneerError(f"{file}: invalid JSON ({error}); the file is corrupt.", file=file, where=RESULT) from error
    kind = _kind(record)
    adapter = folder / "adapter.safetensors"
    if kind is None or not adapter.is_file():
        missing = "adapter.safetensors" if kind else "config of personalize, control train or transfer"
        message = f"{folder}: no {missing}; expected the folder of a run that trained an adapter."
        raise VeneerError(message, file=folder, where=missing, given="missing", expected=tuple(COMMANDS.values()))
    return RunRecord(folder, kind, record)


def _kind(record: object) -> Kind | None:
    """The command that wrote a record."""
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        return None
    if "test_accuracy" in record or "test_map" in record:
        return "transfer"
    if "condition" in record["config"]:
        return "control"
    return "personalize" if "concept" in record["config"] else None


def _timm_repository(model: str) -> str | None:
    """Repository of the pretrained weights that timm loads for a model; None for another library's model."""
    try:
        import timm

        config = timm.get_pretrained_cfg(model)
    except (ImportError, RuntimeError):
        return None
    name = getattr(config, "hf_hub_id", None)
    return name if isinstance(name, str) and is_hub_name(name) else None
