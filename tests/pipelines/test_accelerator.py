"""Whole runs on a simulated accelerator: no operator mixes devices, and the results equal those on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from veneer.pipelines.personalize import PersonalizeConfig, personalize

from tests.accelerators import accelerator_on
from veneer import base_models
from veneer.testing.pipelines import FAMILIES, tiny_pipeline
from veneer.testing.simulated_accelerator import DEVICE, simulated_accelerator
from veneer.training.data.latent_cache import Cache
from veneer.training.objective.denoising_loss import DenoisingLoss

SYNCHRONIZATIONS = 7
"""Allowed in a training step: the loss and the norm of the gradient are read, and the noise schedule is looked up on the CPU."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in FAMILIES:
        tiny_pipeline(kind).save_pretrained(folder / kind)
        (folder / kind / "veneer.json").write_text('{"steps": 2}')
    return folder


def train(base: Path, photos: Path, out: Path, device: str = "cpu", **settings: Any) -> dict[str, Tensor]:
    """The tensors of the adapter file after training, by default without images."""
    config: dict[str, Any] = {
        "steps": 2, "eval": "none", "tracker": "none", "prompts": ("a {concept}",), "drift_prompts": ("a house",),
        "class_word": "cat", "template": ("a {concept}",), "concept": "<toy>", "dtype": "float32", "method": "lora",
        "optimizer": "sgd", "learning_rate": 0.1,  # AdamW's first steps have one size, however small the gradient
    }  # fmt: skip
    if base.name == "dit":
        config |= {"concept": "3", "prompts": ("3",), "drift_prompts": ("5",), "template": ("3",), "class_word": ""}
    with accelerator_on(device) as accelerator:
        personalize(PersonalizeConfig(photos=photos, base=str(base), out=out, **{**config, **settings}), accelerator)
    return load_file(out / "adapter.safetensors")


@pytest.mark.usefixtures("small_flux")
@pytest.mark.parametrize("kind", sorted({*FAMILIES} - {"sd2"}))  # which is `sd` with another objective
def test_a_run_equals_that_on_the_cpu(kind: str, bases: Path, photos: Path, tmp_path: Path) -> None:
    method = "lora" if kind in ("dit", "pixart") else "pivotal"
    seeds = 1 if kind == "sd" else 0  # with scores for one family: they depend on images only, which take seconds each
    settings: dict[str, Any] = {"method": method, "eval": "full", "eval_seeds": seeds, "features": "bundled"}
    expected = train(bases / kind, photos, tmp_path / "cpu", **settings)
    with simulated_accelerator() as accelerator:
        got = train(bases / kind, photos, tmp_path / "device", DEVICE, **settings)
    assert accelerator.peak_bytes > 0
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, rtol=1e-3, atol=1e-6), name


def test_the_host_waits_a_few_times_in_each_step(bases: Path, photos: Path, tmp_path: Path) -> None:
    counts = []
    for steps in (2, 5):
        with simulated_accelerator() as accelerator:
            train(bases / "sd", photos, tmp_path / str(steps), DEVICE, steps=steps)
        counts.append(accelerator.synchronizations.total())
    assert counts[1] - counts[0] <= 3 * SYNCHRONIZATIONS


def test_encoders_leave_the_device_while_training(
    bases: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []
    losses = DenoisingLoss.losses

    def watched(self: DenoisingLoss, step: int, examples: Any) -> Tensor:
        seen.append({name: _device(part) for name, part in self.family.pipe.components.items() if isinstance(part, nn.Module)})
        return losses(self, step, examples)

    monkeypatch.setattr(DenoisingLoss, "losses", watched)
    files = {}
    for offload in (True, False):
        with simulated_accelerator():
            files[offload] = train(bases / "sdxl", photos, tmp_path / str(offload), DEVICE, offload_encoders=offload)
    encoders = ("vae", "text_encoder", "text_encoder_2")
    assert [s[name] for s in seen for name in encoders] == ["cpu"] * 6 + ["simulated"] * 6
    assert {s["unet"] for s in seen} == {"simulated"}
    assert all(torch.equal(files[True][name], files[False][name]) for name in files[True])


@pytest.mark.parametrize("reason", ["method", "crop", "cache", "captions", "memory"])
def test_encoders_stay_where_their_outputs_are_not_cached(
    reason: str, bases: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[Any] = []
    monkeypatch.setattr("veneer.pipelines.personalize.offload_encoders", moved.append)
    settings: dict[str, Any] = {
        "method": {"method": "pivotal"}, "crop": {"crop": "random"}, "cache": {"cache": False},
        "captions": {"shuffle_tags": True}, "memory": {},
    }[reason]  # fmt: skip
    if reason == "memory":
        monkeypatch.setattr("veneer.training.personalization_data.Cache", lambda folder: Cache(folder, memory=100))
    with simulated_accelerator():
        train(bases / "sd", photos, tmp_path / "out", DEVICE, steps=1, **settings)
    assert (tmp_path / "out" / "adapter.safetensors").is_file()
    assert not moved


def test_training_needs_less_memory_without_encoders(bases: Path, photos: Path, tmp_path: Path) -> None:
    pipe = base_models.load(bases / "sd")
    encoders = sum(p.numel() * p.element_size() for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())
    held = {offload: _held(bases / "sd", photos, tmp_path / str(offload), offload) for offload in (True, False)}
    assert held[False] - held[True] >= encoders


def _held(base: Path, photos: Path, out: Path, offload: bool) -> int:
    """Bytes on the device at the end of a training step."""
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch, simulated_accelerator() as accelerator:
        losses = DenoisingLoss.__call__

        def watched(self: DenoisingLoss, step: int, rows: Any) -> Tensor:
            sizes.append(accelerator.bytes)
            return losses(self, step, rows)

        patch.setattr(DenoisingLoss, "__call__", watched)
        train(base, photos, out, DEVICE, steps=1, offload_encoders=offload)
    return sizes[0]


def _device(module: nn.Module) -> str:
    return next(module.parameters()).device.type


def test_bytes_on_the_device_are_counted() -> None:
    with simulated_accelerator() as accelerator:
        before = accelerator.bytes
        x = torch.zeros(256, device=DEVICE)
        view = x[:128]
        assert accelerator.bytes - before == 1024
        del x, view
        assert accelerator.bytes == before
        assert accelerator.peak_bytes >= before + 1024
