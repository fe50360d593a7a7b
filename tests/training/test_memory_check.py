"""Whether a run fits into a memory, and the cheapest changes that make it fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from veneer.pipelines.personalize import personalize

from tests.raising import raises
from veneer.base_models import BaseModelError
from veneer.cli import main
from veneer.injection import OptionError, UnsupportedSite
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.personalization_config import PersonalizeConfig
from veneer.training.preflight.memory_changes import propose
from veneer.training.preflight.memory_check import check_memory
from veneer.training.preflight.memory_prediction import MemoryPredictor
from veneer.training.preflight.memory_size import parse_capacity
from veneer.training.preflight.preflight import PreflightError

RUN = PersonalizeConfig(concept="<toy>", resolution=128, batch=4, dtype="float32", offload_encoders=False)
"""A run with everything left to save."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`RUN` of a tiny base model, because a step of the bundled one takes a second to count."""
    folder = tmp_path_factory.mktemp("bases") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    return replace(RUN, base=str(folder))


@pytest.fixture(scope="module")
def predictor():
    """Shared, since it counts activations once for each variant."""
    return MemoryPredictor("cuda")


@pytest.fixture(scope="module")
def config(run):
    return run.with_defaults()


@pytest.mark.parametrize(
    ("text", "size"), [("12GB", 12 * 10**9), ("12GiB", 12 * 2**30), ("7.5 gb", 7_500_000_000), ("512MiB", 2**29), ("1mb", 10**6)]
)
def test_sizes(text, size):
    capacity = parse_capacity(text)
    assert (capacity.size, capacity.device) == (size, "cuda")


def test_the_memory_of_this_machine():
    capacity = parse_capacity("cpu")
    assert capacity.device == "cpu"
    assert capacity.size > 2**20


@pytest.mark.parametrize("text", ["12GBs", "12", "GB", "-1GB", "0GB", "", "12 G", "tpu", "1e3GB"])
def test_wrong_sizes(text):
    cuda = ("cuda",) if torch.cuda.is_available() else ()
    with raises(OptionError, option="check", given=text, expected=("12GB", "12GiB", "cpu", *cuda)):
        parse_capacity(text)


def test_a_single_change_suffices(predictor, config):
    peak = predictor.predict(config).peak
    found = propose(predictor, config, peak - 1)
    assert found.flags == ("--gradient-checkpointing",)
    assert found.fits
    assert found.config == replace(config, gradient_checkpointing=True)
    assert found.prediction == predictor.predict(found.config)
    assert found.prediction.peak < peak


def test_a_change_that_does_not_suffice_is_passed_over(predictor, config):
    checkpointing = predictor.predict(replace(config, gradient_checkpointing=True)).peak
    batch = predictor.predict(replace(config, batch=1)).peak
    assert batch < checkpointing
    assert propose(predictor, config, checkpointing - 1).flags == ("--batch 1",)


def test_several_changes_in_the_order_of_their_cost(predictor, config):
    """None suffices alone, and none of the proposed ones can be left out."""
    both = predictor.predict(replace(config, gradient_checkpointing=True, batch=1, dtype="bfloat16", offload_encoders=True)).peak
    found = propose(predictor, config, both)
    assert found.fits
    assert found.prediction.peak <= both
    assert len(found.flags) > 1
    for flag in found.flags:
        name = flag.split()[0].removeprefix("--").replace("-", "_")
        without = replace(found.config, **{name: getattr(config, name)})
        assert predictor.predict(without).peak > both, flag


def test_nothing_suffices(predictor, config):
    found = propose(predictor, config, 10**5)
    assert not found.fits
    assert found.prediction.peak > 10**5
    assert found.prediction.peak < predictor.predict(config).peak / 2
    assert "--resolution 32" in found.flags
    assert sum(flag.startswith("--resolution") for flag in found.flags) == 1


def test_activations_are_not_counted_beyond_the_limit(predictor, config):
    assert predictor.predict(config, 10**6).activations == 0
    assert predictor.predict(config, 10**12).activations > 0


@pytest.mark.parametrize("changes", [{"batch": 2}, {"resolution": 64}, {"offload_encoders": True}, {"dtype": "bfloat16"}])
def test_weights_that_are_known_are_those_of_a_new_model(predictor, config, changes):
    predictor.predict(config, 0)
    changed = replace(config, **changes)
    assert predictor.predict(changed, 0) == MemoryPredictor("cuda").predict(changed, 0)


def test_a_run_that_fits(run):
    found = check_memory(replace(run, check="1GB"))
    found.check()
    assert found.proposal is None
    assert found.prediction.peak < 10**9
    assert all(part in found.table() for part in ("unet", "text_encoder", "vae", "adapters", "peak, training"))


def test_a_run_that_does_not_fit(run, predictor, config):
    found = check_memory(replace(run, check=f"{predictor.predict(config).peak // 2**20}MiB"))
    assert found.proposal is not None
    with pytest.raises(PreflightError) as caught:
        found.check()
    (concern,) = caught.value.given
    assert (concern.about, concern.severity) == ("memory", "error")
    assert all(flag in str(caught.value) for flag in found.proposal.flags)


def test_personalize_checks_without_weights_or_files(run, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["personalize", "--base", run.base, "--resolution", "64", "--out", str(out), "--check"]
    assert main([*arguments, "1GB"]) == 0
    assert "peak, training" in capsys.readouterr().out
    assert main([*arguments, "0.1MB"]) == 1
    captured = capsys.readouterr()
    assert "--gradient-checkpointing" in captured.err
    assert "peak, training" in captured.out
    assert main([*arguments, "1GBs"]) == 1
    assert not out.exists()


def test_an_architecture_is_no_base_model_without_a_check(tmp_path):
    with raises(BaseModelError, where="kind", given="sd15", expected="weights"):
        personalize(PersonalizeConfig(base="sd15", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_tokens_count(predictor, config):
    """The base model is built without tokenizers; every vector has the width of the text encoder."""
    plain = predictor.predict(replace(config, method="lora"))
    both = predictor.predict(replace(config, method="pivotal", options={**config.options, "textual_inversion": {"vectors": 3}}))
    assert both.values - plain.values == 3 * 24


@pytest.mark.parametrize("method", ["glora", "full"])
def test_quantization_is_not_proposed_to_methods_that_compute_the_weight(predictor, config, method):
    found = propose(predictor, replace(config, method=method, options={}), 1)
    assert not any("quantize" in flag for flag in found.flags)
    assert "--gradient-checkpointing" in found.flags
    with raises(UnsupportedSite, method=method, given="nf4"):
        predictor.predict(replace(config, method=method, options={}, quantize=("nf4",)))


def test_a_sharded_base_is_not_predicted():
    with raises(OptionError, option="shard_base", given=True):
        check_memory(replace(RUN, check="1GB", shard_base=True))
