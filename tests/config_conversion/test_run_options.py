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
from veneer.training.loop.optimizers import parse_arguments
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


PRODIGY = {"betas": [0.9, 0.999], "use_bias_correction": False, "safeguard_warmup": False}


@pytest.mark.parametrize(
    ("given", "name", "decay", "options"),
    [
        ("SGDNesterov", "nesterov", 0.0, {}), ("SGD", "sgd", 0.0, {"momentum": 0.0}), ("Adam", "adam", 0.0, {}),
        ("adam8bit", "adam8bit", 0.0, {}), ("AdamW8bit", "adamw8bit", None, {}), ("Lion", "lion", 0.0, {}),
        ("AdamWScheduleFree", "schedule_free_adamw", 0.0, {}), ("prodigyopt.Prodigy", "prodigy", 0.0, PRODIGY),
        ("ProdigyOpt", "prodigy", 0.0, PRODIGY),
    ],
)  # fmt: skip
def test_optimizers_keep_their_class_and_its_defaults(
    given: str, name: str, decay: float | None, options: dict[str, Any], tmp_path: Path
) -> None:
    found = arguments(tmp_path, optimizer_type=given)
    assert (found.content["optimizer"], found.content.get("weight_decay")) == (name, decay)
    assert found.content.get("optimizer_args", {}) == options
    assert parse_arguments(name, options).keys() == options.keys()
    assert left_out(found) == set()


def test_arguments_of_the_file_win_over_defaults_of_the_class(tmp_path: Path) -> None:
    found = arguments(tmp_path, optimizer_type="Prodigy", optimizer_args=["weight_decay=0.2", "safeguard_warmup=True"])
    assert found.content["weight_decay"] == 0.2
    assert found.content["optimizer_args"] == {**PRODIGY, "safeguard_warmup": "True"}


def test_ai_toolkit_has_another_epsilon(tmp_path: Path) -> None:
    found = job(tmp_path, train={"optimizer": "prodigy", "optimizer_params": {"betas": [0.8, 0.9]}})
    assert found.content["optimizer_args"] == {**PRODIGY, "betas": [0.8, 0.9], "eps": 1e-6}
    assert job(tmp_path, train={"optimizer": "lion8bit"}).content.get("optimizer_args") is None


def test_an_unknown_optimizer_has_the_defaults_of_a_run(tmp_path: Path) -> None:
    found = arguments(tmp_path, optimizer_type="Automagic")
    assert left_out(found) == {"optimizer_type"}
    assert found.content.keys().isdisjoint({"optimizer", "optimizer_args", "weight_decay"})


def test_defaults_are_those_of_the_classes() -> None:
    """The tables of the conversion against the signatures, for every package that is installed."""
    for name, entry in BUILT_IN.items():
        try:
            parameters = inspect.signature(load_class(name)).parameters
        except MissingExtra:
            continue
        assert parameters["weight_decay"].default == (0.01 if name in DECAYING else 0), name
        differing = {key for key, value in entry.defaults.items() if parameters[key].default != value}
        required = {"momentum"} if name in ("sgd8bit", "lars8bit") else set()  # 0 is an error of the class
        assert differing - required == CLASS_ARGUMENTS.get(name, {}).keys(), name
        for key, value in CLASS_ARGUMENTS.get(name, {}).items():
            assert parameters[key].default == (tuple(value) if isinstance(value, list) else value), (name, key)
