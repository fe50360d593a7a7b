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
    ("source", "name", "decay", "options"),
    [
        ("SGDNesterov", "nesterov", 0.0, {}), ("SGD", "sgd", 0.0, {"momentum": 0.0}), ("Adam", "adam", 0.0, {}),
        ("adam8bit", "adam8bit", 0.0, {}), ("AdamW8bit", "adamw8bit", None, {}), ("Lion", "lion", 0.0, {}),
        ("AdamWScheduleFree", "schedule_free_adamw", 0.0, {}), ("prodigyopt.Prodigy", "prodigy", 0.0, PRODIGY),
        ("ProdigyOpt", "prodigy", 0.0, PRODIGY),
    ],
)  # fmt: skip
def test_optimizers_keep_their_class_and_its_defaults(
    source: str, name: str, decay: float | None, options: dict[str, Any], tmp_path: Path
) -> None:
    conversion = arguments(tmp_path, optimizer_type=source)
    assert (conversion.content["optimizer"], conversion.content.get("weight_decay")) == (name, decay)
    assert conversion.content.get("optimizer_args", {}) == options
    assert parse_arguments(name, options).keys() == options.keys()
    assert left_out(conversion) == set()


def test_arguments_of_the_file_win_over_defaults_of_the_class(tmp_path: Path) -> None:
    conversion = arguments(tmp_path, optimizer_type="Prodigy", optimizer_args=["weight_decay=0.2", "safeguard_warmup=True"])
    assert conversion.content["weight_decay"] == 0.2
    assert conversion.content["optimizer_args"] == {**PRODIGY, "safeguard_warmup": "True"}


def test_ai_toolkit_has_another_epsilon(tmp_path: Path) -> None:
    conversion = job(tmp_path, train={"optimizer": "prodigy", "optimizer_params": {"betas": [0.8, 0.9]}})
    assert conversion.content["optimizer_args"] == {**PRODIGY, "betas": [0.8, 0.9], "eps": 1e-6}
    assert job(tmp_path, train={"optimizer": "lion8bit"}).content.get("optimizer_args") is None


def test_an_unknown_optimizer_has_the_defaults_of_a_run(tmp_path: Path) -> None:
    conversion = arguments(tmp_path, optimizer_type="Automagic")
    assert left_out(conversion) == {"optimizer_type"}
    assert conversion.content.keys().isdisjoint({"optimizer", "optimizer_args", "weight_decay"})


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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"base_weights": ["a.safetensors", "b.safetensors"]}, ["a.safetensors:1", "b.safetensors:1"]),
        ({"base_weights": ["a.pt", "b.pt"], "base_weights_multiplier": [0.5]}, ["a.pt:0.5", "b.pt:1"]),
        ({"base_weights": "a b.pt", "base_weights_multiplier": "0.25"}, ["a b.pt:0.25"]),
    ],
)
def test_base_weights_are_adapters_below_the_trained_one(content: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    conversion = arguments(tmp_path, **content)
    assert (conversion.content["with"], left_out(conversion)) == (expected, set())


def test_multipliers_without_a_file_are_reported(tmp_path: Path) -> None:
    assert left_out(arguments(tmp_path, base_weights_multiplier=[0.5])) == {"base_weights_multiplier"}
    conversion = arguments(tmp_path, base_weights=["a.pt"], base_weights_multiplier=[0.5, 0.7])
    assert (conversion.content["with"], left_out(conversion)) == (["a.pt:0.5"], {"base_weights_multiplier"})


def test_a_pretrained_lora_is_the_initial_adapter(tmp_path: Path) -> None:
    conversion = job(tmp_path, network={"type": "lora", "linear": 4, "pretrained_lora_path": "old.safetensors"})
    assert (conversion.content["init_from"], left_out(conversion)) == ("old.safetensors", set())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"num_cycles": 3, "power": "2"}, {"cycles": 3, "power": 2.0}), ({"min_lr_ratio": 0.1}, {"min_lr_ratio": 0.1}),
        ({"min_lr_rate": "0.2"}, {"min_lr_ratio": 0.2}), ({"eta_min": 5e-5}, {"min_lr_ratio": 0.25}),
        ({"lr_end": "2e-5", "num_warmup_steps": 7}, {"min_lr_ratio": 0.1, "warmup": 7}),
    ],
)  # fmt: skip
def test_arguments_of_schedules(source: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    texts = [f"{name}={value}" for name, value in source.items()]
    for conversion in (
        arguments(tmp_path, unet_lr=2e-4, lr_scheduler="polynomial", lr_scheduler_args=texts),
        job(tmp_path, train={"lr": 2e-4, "lr_scheduler": "polynomial", "lr_scheduler_params": source}),
    ):
        names = {"cycles", "power", "min_lr_ratio", "warmup"}
        assert {key: value for key, value in conversion.content.items() if key in names} == pytest.approx(expected)
        assert left_out(conversion) == set()


def test_other_arguments_of_schedules_are_reported(tmp_path: Path) -> None:
    source = {"num_cycles": 0.5, "eta_min": 1e-5, "T_0": 10, "power": "high", "num_warmup_steps": "inf"}
    conversion = job(tmp_path, train={"lr_scheduler": "cosine", "lr_scheduler_params": source})
    assert left_out(conversion) == {f"train.lr_scheduler_params.{name}" for name in source}
    assert conversion.content.keys().isdisjoint({"cycles", "power", "min_lr_ratio"})


def test_a_cosine_with_a_smallest_rate_is_a_cosine(tmp_path: Path) -> None:
    conversion = arguments(tmp_path, lr_scheduler="cosine_with_min_lr", lr_scheduler_min_lr_ratio=0.1)
    assert (conversion.content["schedule"], conversion.content["min_lr_ratio"], left_out(conversion)) == ("cosine", 0.1, set())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ddim", "ddim"), ("euler_a", "euler_ancestral"), ("dpmsolver++", "dpmpp_2m"), ("dpm_2_a", "dpm2_ancestral"),
        ("k_dpmsolver++", "dpmpp_2m_karras"), ("flowmatch", "flow_euler"), ("dpmsingle", None), ("custom_lcm", None),
    ],
)  # fmt: skip
def test_samplers_are_schedulers_of_previews(source: str, expected: str | None, tmp_path: Path) -> None:
    for conversion, key in (
        (arguments(tmp_path, sample_sampler=source), "sample_sampler"),
        (job(tmp_path, sample={"sampler": source, "sample_steps": 20}), "sample.sampler"),
    ):
        assert conversion.content.get("preview_scheduler") == expected
        assert left_out(conversion) == (set() if expected else {key})
    assert conversion.content["preview_steps"] == 20


def test_a_sampler_with_other_noise_levels_is_reported(tmp_path: Path) -> None:
    conversion = job(tmp_path, sample={"sampler": "k_euler"})
    assert conversion.content["preview_scheduler"] == "euler"
    assert [remark.kind for remark in conversion.remarks if remark.key.endswith("sampler")] == ["changed"]
