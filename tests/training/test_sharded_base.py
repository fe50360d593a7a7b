"""Two processes with a sharded base model, and with a replicated one, give the gradients and files of one process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.raising import raises
from tests.training import sharded_worker as worker
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.loop.errors import TrainError
from veneer.training.personalization_config import PersonalizeConfig

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
"""`accelerate launch` as the documentation has it, with an unused port."""
PROGRAM = """
import sys
from pathlib import Path
from veneer_command import console
from tests.training.sharded_worker import main
main(Path(sys.argv.pop(1)))
console()
"""
"""The jobs of `sharded_worker`, and then the installed `veneer` command, as its script calls it: imports take long."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all jobs of `sharded_worker`, of the same runs on one process, and of a run that is killed in the end.

    It is the command of the documentation, killed after its first checkpoint.
    """
    folder = tmp_path_factory.mktemp("sharded")
    worker.inputs(folder)
    worker.personalized(folder, "one")
    worker.controlled(folder, "control-one")
    worker.transferred(folder, "transfer-one")
    arguments = [
        str(folder / "photos"), "--base", str(folder / "base"), "--out", str(folder / "killed"), "--concept", "<toy>",
        "--class-word", "cat", "--method", "dora", "--where", "attn", "--steps", "500", "--checkpoint-every", "1", "--batch", "2",
        "--optimizer", "sgd", "--learning-rate", "0.1", "--eval-seeds", "0", "--tracker", "none",
    ]  # fmt: skip
    command = (sys.executable, "-c", PROGRAM, str(folder), "personalize", *arguments, "--shard-base")
    with launched(folder / "worker.txt", "--no_python", *command) as process:
        wait_for(folder / "killed", process, folder / "worker.txt")
    return folder


@contextlib.contextmanager
def launched(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Two processes of `accelerate launch`; they are killed at the end of the block if they still run."""
    with log.open("w") as file:
        process = subprocess.Popen([*LAUNCH, *words], env=ENVIRONMENT, cwd=ROOT, stdout=file, stderr=file)
        try:
            yield process
        finally:
            kill(process)


@pytest.fixture(scope="module")
def facts(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in (0, 1)]


def assert_same_files(folder: Path, other: Path, atol: float) -> None:
    """The same tensors up to `atol`, and the same headers but for hashes of the tensors, in all safetensors files of two runs."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert names == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    for name in names:
        torch.testing.assert_close(load_file(other / name), load_file(folder / name), rtol=0, atol=atol)
        with safe_open(folder / name, "pt") as one, safe_open(other / name, "pt") as two:
            first, second = ({k: v for k, v in (each.metadata() or {}).items() if "hash" not in k} for each in (one, two))
            assert first == second


@pytest.mark.parametrize("name", worker.CASES)
def test_gradients_are_those_of_one_process(name: str, folder: Path) -> None:
    """Float32 sums in another order: 1e-5 of the largest gradient."""
    expected, _ = worker.gradients(worker.CASES[name], folder / "photos", shard=False)
    found = load_file(folder / f"{name}.safetensors")
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", worker.CASES)
def test_each_process_holds_a_part_of_the_base_model(name: str, facts: list[dict[str, Any]]) -> None:
    """Half of every tensor, which is rounded up to whole rows on the first process."""
    (first, whole, largest), (second, *same) = (each[name] for each in facts)
    assert [whole, largest] == same
    assert whole == first + second
    assert 0.45 * whole < second <= first < 0.55 * whole
    assert largest < 0.5 * whole, "the weights are gathered block by block"


def test_the_estimate_has_the_part_of_each_process(facts: list[dict[str, Any]]) -> None:
    """And not all whole weights at once: they are gathered block by block."""
    base, activations = worker.memory(shard=False)
    whole = sum(p.numel() * p.element_size() for p in tiny_pipeline("sd").unet.parameters())
    for each in facts:
        own, activated = each["memory"]
        assert own == pytest.approx(base - whole / 2, abs=0.01 * whole)
        assert activations <= activated < activations + 0.5 * whole


@pytest.mark.parametrize("name", ["replicated", "sharded", "continued"])
def test_files_of_personalize_are_those_of_one_process(name: str, folder: Path) -> None:
    """Adapter, token embedding, diffusers file and checkpoints; class images and previews too. `continued` began on one."""
    assert_same_files(folder / "one", folder / name, 1e-6)
    assert json.loads((folder / name / "result.json").read_text())["training"]["steps"] == worker.PERSONALIZE["steps"]
    assert sorted(path.name for path in (folder / name / "prior").iterdir()) == ["prior-00000.png", "prior-00001.png"]
    assert sorted(path.name for path in (folder / name / "previews").iterdir()) == ["step-000002.png", "step-000004.png"]


def test_files_of_control_are_those_of_one_process(folder: Path) -> None:
    """ControlNeXt, which trains base weights: they stay whole on every process."""
    assert_same_files(folder / "control-one", folder / "control-sharded", 1e-6)
    assert (folder / "control-sharded" / "controlnext" / "unet.safetensors").is_file()
    curves = [json.loads((folder / name / "curve.json").read_text()) for name in ("control-one", "control-sharded")]
    assert curves[0] == curves[1]


def test_files_of_transfer_are_those_of_one_process(folder: Path) -> None:
    """Data parallelism: the base model is replicated."""
    assert_same_files(folder / "transfer-one", folder / "transfer-two", 1e-5)


def test_adapters_that_are_sharded_too_are_saved_and_loaded_whole(folder: Path, facts: list[dict[str, Any]]) -> None:
    _, attached = worker.attached_pipe()
    expected = attached.save(folder / "whole.safetensors")
    assert (folder / "everything.safetensors").read_bytes() == expected.read_bytes()
    attached.load_state_dict({name: tensor + 1 for name, tensor in attached.state_dict().items()})
    expected = attached.save(folder / "whole-loaded.safetensors")
    assert (folder / "loaded.safetensors").read_bytes() == expected.read_bytes()
    parameters = facts[0]["everything"]["parameters"]
    assert sum(each["everything"]["parts"] for each in facts) == parameters
    assert all(0 < each["everything"]["parts"] < parameters for each in facts)


@pytest.mark.parametrize("call", ["attach", "merge"])
def test_attaching_and_merging_after_sharding_are_errors(call: str, facts: list[dict[str, Any]]) -> None:
    assert [each["everything"][call] for each in facts] == [["UNet2DConditionModel", "sharding"]] * 2


def test_a_killed_run_continues_on_one_process(folder: Path) -> None:
    """The killed run, resumed without the other process."""
    settings: dict[str, Any] = {
        "method": "dora", "where": ("attn",), "checkpoint_every": 1, "batch": 2, "eval_seeds": 0, "text_encoder": False,
        "class_images": 0, "preview_every": 0, "template": None, "prompts": None, "drift_prompts": None,
    }  # fmt: skip
    steps = max(int(path.name[-6:]) for path in (folder / "killed").glob("checkpoint-*")) + 1
    worker.personalized(folder, "killed", resume=True, steps=steps, **settings)
    worker.personalized(folder, "never-killed", steps=steps, **settings)
    assert_same_files(folder / "never-killed", folder / "killed", 1e-6)


def wait_for(run: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for the first checkpoint of a run."""
    deadline = time.monotonic() + 600
    while not list(run.glob("checkpoint-*")):
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the launcher and the processes that it started, if they still run."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for child in children:
        child.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()
    psutil.wait_procs(children, timeout=30)


def test_a_quantized_base_model_is_not_sharded(tmp_path: Path) -> None:
    config = PersonalizeConfig(photos=tmp_path, concept="<toy>", quantize=("nf4",), shard_base=True, out=tmp_path / "out")
    with raises(TrainError, where="shard_base", given=("nf4",), expected=()):
        config.with_defaults()


def test_sharding_has_no_effect_on_one_process(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker.personalized(folder, "alone", shard_base=True)
    assert "--shard-base" in capsys.readouterr().out
    for name in ("adapter.safetensors", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"):
        assert (folder / "alone" / name).read_bytes() == (folder / "one" / name).read_bytes()
