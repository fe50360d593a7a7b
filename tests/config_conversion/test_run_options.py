"""Optimizers, schedules, samplers and adapters of other trainers' configs: values, and remarks on what is not carried over."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from veneer.config_conversion import ConfigConversion, convert_file
from veneer.config_conversion.run_options import CLASS_ARGUMENTS, DECAYING
from veneer.injection.errors import MissingExtra
from veneer.training.loop.optimizers.catalog import BUILT_IN, load_class


def arguments(folder: Path, **content: Any) -> ConfigConversion:
    """Converted training arguments of sd-scripts."""
    file = folder / "arguments.json"
    file.write_text(json.dumps({"network_dim": 4, **content}))
    return convert_file(file)


def job(folder: Path, **sections: Any) -> ConfigConversion:
    """A converted job of ai-toolkit."""
    process = {"type": "sd_trainer", "trigger_word": "zwx", "datasets": [], **sections}
    file = folder / "job.json"
    file.write_text(json.dumps({"config": {"process": [process]}}))
    return convert_file(file)


def left_out(conversion: ConfigConversion) -> set[str]:
    return {remark.key.rpartition("config.process[0].")[2] for remark in conversion.remarks if remark.kind == "left_out"}


@pytest.mark.parametrize("path", ["foreign_module.Opt", "Foreign_Module.Opt", "torch.optim.NAdam"])
def test_no_module_that_a_file_names_is_imported(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_module.py").write_text("import torch\nclass Opt(torch.optim.SGD): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for conversion in (
        arguments(tmp_path, optimizer_type=path, optimizer_args=["momentum=0.5", "eps=1e-6"]),
        job(tmp_path, train={"optimizer": path, "optimizer_params": {"momentum": 0.5}}),
    ):
        assert "foreign_module" not in sys.modules
        assert "optimizer" not in conversion.content
        assert {key.rpartition(".")[2] for key in left_out(conversion)} >= {"momentum"}
        assert any(key.endswith(("optimizer_type", "optimizer")) for key in left_out(conversion))


def test_the_path_of_a_known_class_is_its_name(tmp_path: Path) -> None:
    conversion = arguments(tmp_path, optimizer_type="bitsandbytes.optim.AdEMAMix8bit")
    assert (conversion.content["optimizer"], left_out(conversion)) == ("ademamix8bit", set())
