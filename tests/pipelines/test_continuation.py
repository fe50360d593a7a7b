"""`--init-from`, `--with`, `--block-lr` and `--optimizer` in `personalize`, `control train`, `transfer` and `compare`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from veneer.pipelines.compare import CompareConfig, compare
from veneer.pipelines.control import ControlConfig, control
from veneer.pipelines.generate import GenerateConfig, generate
from veneer.pipelines.personalize import PersonalizeConfig, personalize
from veneer.pipelines.transfer import TransferConfig, transfer

import veneer
from tests.classification.small import image_folder, model_folder
from tests.raising import raises, warns
from veneer.config_file import entries_of, read_config, to_toml
from veneer.flags import values
from veneer.injection.errors import LoadError, OptionError, SelectionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.fixed_adapters import file_digest
from veneer.training.loop.checkpoints import CheckpointError
from veneer.training.loop.optimizers import OptimizerWarning

QUICK: Mapping[str, Any] = {
    "steps": 2, "eval_seeds": 0, "tracker": "none", "prompts": ("a {concept}",), "class_word": "cat",
    "template": ("a {concept}",), "concept": "<toy>",
}  # fmt: skip
STILL = 1e-12
"""A learning rate that leaves the weights as they are."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    (folder / "veneer.json").write_text(
        '{"steps": 3, "things": ["cat", "dog"], "scenes": ["a {thing}, left", "a {thing}, right"]}'
    )
    return str(folder)


def run(base: str, photos: Path, out: Path, **settings: Any) -> Path:
    return personalize(PersonalizeConfig(photos=photos, base=base, out=out, **{**QUICK, **settings}))


def state_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter.safetensors")


def changes(base: str, out: Path) -> dict[str, torch.Tensor]:
    """Scaled B A of each weight in a LoRA file."""
    attachment = next(a for a in veneer.load_all(veneer.base_models.load(base), out) if a.method.name == "lora")
    return {name: adapter.scaling * adapter.up @ adapter.down for name, (_, adapter) in attachment.parts.items()}


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 8, "alpha": 2.0}])
def test_a_run_continues_from_a_file(base: str, photos: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Without weight updates the new file has the same ΔW, at another rank and alpha too."""
    first = run(base, photos, tmp_path / "first", options={"lora": {"rank": 4}}, learning_rate=1e-2)
    second = run(
        base, photos, tmp_path / "second", options={"lora": options}, learning_rate=STILL, weight_decay=0.0, init_from=first
    )
    before, after = changes(base, first), changes(base, second)
    assert any(change.abs().max() > 1e-3 for change in before.values())
    for name, change in before.items():
        torch.testing.assert_close(after[name], change, rtol=1e-4, atol=1e-6)


def test_the_trigger_token_of_the_file_is_taken_over(base: str, photos: Path, tmp_path: Path) -> None:
    first = run(base, photos, tmp_path / "first", method="pivotal", concept="<vase>", learning_rate=1e-2)
    second = run(
        base, photos, tmp_path / "second", method="pivotal", concept="", class_word="", prompts=None, learning_rate=STILL,
        token_learning_rate=STILL, weight_decay=0.0, init_from=first,
    )  # fmt: skip
    config = json.loads((second / "result.json").read_text())["config"]
    assert (config["concept"], config["class_word"]) == ("<vase>", "cat")
    old, new = ({k: t for k, t in state_of(out).items() if "vocabulary" in k} for out in (first, second))
    assert old
    assert all(torch.allclose(new[key], tensor, atol=1e-6) for key, tensor in old.items())


def test_a_resumed_run_needs_the_same_initial_file(base: str, photos: Path, tmp_path: Path) -> None:
    first = run(base, photos, tmp_path / "first")
    other = run(base, photos, tmp_path / "other", seed=1, learning_rate=1e-2)
    out = tmp_path / "second"
    settings: dict[str, Any] = {"init_from": first, "checkpoint_every": 1, "schedule": "constant"}
    run(base, photos, out, **settings)
    with pytest.raises(CheckpointError) as caught:
        run(base, photos, out, **{**settings, "init_from": other, "steps": 3, "resume": True})
    assert [*caught.value.expected] == ["init_from"]
    run(base, photos, out, **{**settings, "steps": 3, "resume": True})
    assert json.loads((out / "result.json").read_text())["training"]["steps"] == 3


def test_methods_and_sites_must_match(base: str, photos: Path, tmp_path: Path) -> None:
    first = run(base, photos, tmp_path / "first")
    with raises(LoadError, where="method", given=("lora",), expected=("lora", "textual_inversion")):
        run(base, photos, tmp_path / "a", method="pivotal", init_from=first)
    with raises(LoadError, where="sites"):
        run(base, photos, tmp_path / "b", where=("mlp",), init_from=first)
    assert not (tmp_path / "b").exists()


def test_a_run_on_top_of_a_fixed_adapter(base: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fixed adapter acts in training, is not in the new file, and is needed to generate."""
    style = run(base, photos, tmp_path / "style", learning_rate=3e-2, seed=1, steps=4)
    alone = run(base, photos, tmp_path / "alone", learning_rate=1e-2)
    out = run(base, photos, tmp_path / "out", learning_rate=1e-2, with_=(f"{style}:0.5",))
    assert state_of(out).keys() == state_of(alone).keys()
    assert not all(torch.equal(tensor, state_of(alone)[key]) for key, tensor in state_of(out).items())
    record = veneer.load(veneer.base_models.load(base), out).provenance["with"]
    assert record == [{"file": str(style), "scale": 0.5, "sha256": file_digest(style)}]
    assert f"--adapter {style}:0.5 {out}" in capsys.readouterr().out

    settings: dict[str, Any] = {"prompt": ("a cat",), "steps": 1, "device": "cpu", "out": tmp_path / "images"}
    generate(GenerateConfig(adapter=(str(out),), **settings))
    assert f"--adapter {style}:0.5 {out}" in capsys.readouterr().out
    generate(GenerateConfig(adapter=(f"{style}:0.5", str(out)), **settings))
    assert "--adapter" not in capsys.readouterr().out


def test_the_losses_on_top_are_those_of_the_base_with_the_adapter(base: str, photos: Path, tmp_path: Path) -> None:
    """The first loss of a new LoRA, whose ΔW is 0: with a strength of 0 that of the base model, else another one."""
    style = run(base, photos, tmp_path / "style", learning_rate=3e-2, seed=1, steps=4)
    losses = {}
    for name, with_ in {"plain": (), "off": (f"{style}:0",), "half": (f"{style}:0.5",), "on": (str(style),)}.items():
        out = run(base, photos, tmp_path / name, steps=1, with_=with_)
        losses[name] = json.loads((out / "result.json").read_text())["training"]["loss"]
    assert losses["off"] == losses["plain"]
    assert len({losses["plain"], losses["half"], losses["on"]}) == 3


def test_fixed_adapters_must_match_on_resume(base: str, photos: Path, tmp_path: Path) -> None:
    style = run(base, photos, tmp_path / "style", learning_rate=1e-2)
    settings: dict[str, Any] = {"checkpoint_every": 1, "schedule": "constant"}
    run(base, photos, tmp_path / "out", **settings, with_=(f"{style}:0.5",))
    with pytest.raises(CheckpointError) as caught:
        run(base, photos, tmp_path / "out", **settings, with_=(f"{style}:0.7",), steps=3, resume=True)
    assert [*caught.value.expected] == ["with"]


def test_a_missing_fixed_adapter_is_an_error_before_training(base: str, photos: Path, tmp_path: Path) -> None:
    with raises(OptionError, option="adapter", given="nowhere.safetensors:0.5"):
        run(base, photos, tmp_path / "out", with_=("nowhere.safetensors:0.5",))


def test_block_rates_and_optimizers_reach_the_run(base: str, photos: Path, tmp_path: Path) -> None:
    """The first update of sign descent is the learning rate times the factor."""
    settings: dict[str, Any] = {"steps": 1, "optimizer": "lion", "weight_decay": 0.0, "learning_rate": 0.01, "max_grad_norm": 0.0}
    out = run(base, photos, tmp_path / "out", block_lr={"unet.up": 0.25}, **settings)
    sizes = {key: tensor.abs().max().item() for key, tensor in state_of(out).items() if key.endswith(":up")}
    for key, size in sizes.items():
        assert size == pytest.approx(0.0025 if "up_blocks" in key else 0.01), key
    assert {"up_blocks" in key for key in sizes} == {True, False}
    with raises(SelectionError, where="block_lr", pattern="unet.north"):
        run(base, photos, tmp_path / "wrong", block_lr={"unet.north": 0.25}, **settings)


def test_prodigy_warns_about_learning_rates(base: str, photos: Path, tmp_path: Path) -> None:
    with warns(OptimizerWarning, where="prodigy", given=("learning_rate", "block_lr")):
        PersonalizeConfig(photos=photos, concept="<toy>", optimizer="prodigy", learning_rate=1e-4, block_lr={"mid": 0.5},
                          out=tmp_path / "a").with_defaults()  # fmt: skip
    PersonalizeConfig(photos=photos, concept="<toy>", optimizer="prodigy", learning_rate=1.0, out=tmp_path / "a").with_defaults()


@pytest.mark.parametrize("name", ["schedule_free_adamw", "muon", "adan"])
def test_stopped_and_resumed_runs_give_the_same_files(base: str, photos: Path, tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {"optimizer": name, "checkpoint_every": 2, "preview_every": 1, "learning_rate": 1e-2}
    whole = run(base, photos, tmp_path / "whole", steps=4, **settings)
    run(base, photos, tmp_path / "parts", steps=2, **settings)
    parts = run(base, photos, tmp_path / "parts", steps=4, resume=True, **settings)
    assert all(torch.equal(tensor, state_of(parts)[key]) for key, tensor in state_of(whole).items())


def test_previews_have_the_steps_and_the_scheduler_of_the_options(base: str, photos: Path, tmp_path: Path) -> None:
    """Training is bitwise the same; the images differ, and say how they were sampled."""
    plain = run(base, photos, tmp_path / "plain", preview_every=1)
    options: dict[str, Any] = {"preview_every": 1, "preview_steps": 2, "preview_scheduler": "ddpm"}
    out = run(base, photos, tmp_path / "out", **options)
    assert all(torch.equal(tensor, state_of(out)[key]) for key, tensor in state_of(plain).items())
    images = [next((folder / "previews").iterdir()).read_bytes() for folder in (plain, out)]
    assert images[0] != images[1]
    config = json.loads((out / "result.json").read_text())["config"]
    assert (config["preview_steps"], config["preview_scheduler"]) == (2, "ddpm")
    with raises(OptionError, option="preview_steps", given=0):
        run(base, photos, tmp_path / "zero", preview_steps=0)
    with raises(OptionError, option="scheduler", given="flow_euler"):
        run(base, photos, tmp_path / "wrong", preview_scheduler="flow_euler")


def test_control_continues_from_a_file_and_on_top_of_another(base: str, photos: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": photos, "base": base, "steps": 2, "batch": 2, "tracker": "none", "template": "a thing", "validation": 0.34,
        "grid_images": 1, "preview_every": 0, "eval_seeds": 1, "method": "controlnext",
    }  # fmt: skip
    first = control(ControlConfig(out=tmp_path / "first", learning_rate=1e-2, **settings))
    second = control(ControlConfig(out=tmp_path / "second", learning_rate=STILL, weight_decay=0.0, init_from=first, **settings))
    for key, tensor in state_of(first).items():
        torch.testing.assert_close(state_of(second)[key], tensor, rtol=1e-5, atol=1e-6)
    style = run(base, photos, tmp_path / "style", learning_rate=3e-2)
    options = {**settings, "method": "t2i_adapter", "block_lr": {"unet": 0.5}, "preview_steps": 1, "preview_scheduler": "ddpm"}
    out = control(ControlConfig(out=tmp_path / "out", with_=(str(style),), **options))
    assert veneer.load(veneer.base_models.load(base), out).provenance["with"][0]["sha256"] == file_digest(style)
    with raises(LoadError, where="method", given=("controlnext",), expected=("t2i_adapter",)):
        control(ControlConfig(out=tmp_path / "wrong", init_from=first, **options))


def test_transfer_continues_from_a_file(tmp_path: Path) -> None:
    pictures, model = image_folder(tmp_path / "pictures", count=8), model_folder(tmp_path / "models", "vit")
    settings: dict[str, Any] = {
        "data": str(pictures), "model": str(model), "batch": 8, "augment": "none", "workers": 1, "test": 0.25, "epochs": 2,
    }  # fmt: skip
    first = transfer(TransferConfig(out=tmp_path / "first", learning_rate=1e-2, **settings))
    still = {"learning_rate": STILL, "weight_decay": 0.0}
    second = transfer(TransferConfig(out=tmp_path / "second", init_from=first, **still, **settings))
    for key, tensor in state_of(first).items():
        torch.testing.assert_close(state_of(second)[key], tensor, rtol=1e-5, atol=1e-6)
    with raises(OptionError, option="init_from", given=str(first)):
        transfer(TransferConfig(out=tmp_path / "third", init_from=first, lp_ft=True, **settings))
    with raises(SelectionError, where="block_lr", pattern="mlp"):
        transfer(TransferConfig(out=tmp_path / "fourth", block_lr={"mlp": 0.5}, **settings))


def test_schedule_free_classifiers_are_saved_with_averaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a partial epoch: the checkpoint has the weights of training, the adapter file y + (1 - 1/beta) (z - y)."""
    monkeypatch.setattr("veneer.pipelines.transfer.tidy", lambda out: None)
    pictures, model = image_folder(tmp_path / "pictures", count=8), model_folder(tmp_path / "models", "vit")
    out = transfer(
        TransferConfig(
            data=str(pictures), model=str(model), batch=2, augment="none", workers=1, test=0.25, learning_rate=1e-2,
            optimizer="schedule_free_sgd", optimizer_args={"momentum": "0.8"}, steps=3, warmup=0.0, out=tmp_path / "out",
        )
    )  # fmt: skip
    weights, state = (load_file(out / "checkpoint-000003" / f"{name}.safetensors") for name in ("weights", "optimizer"))
    saved, compared = state_of(out), 0
    for key, tensor in saved.items():
        if f"{key}:z" in state:
            expected = weights[key] + (1 - 1 / 0.8) * (state[f"{key}:z"] - weights[key])
            torch.testing.assert_close(tensor, expected)
            compared += not torch.equal(tensor, weights[key])
    assert compared


def test_compare_trains_all_rows_with_the_optimizer(tmp_path: Path) -> None:
    pictures, model = image_folder(tmp_path / "pictures", count=8), model_folder(tmp_path / "models", "vit")
    settings: dict[str, Any] = {
        "data": str(pictures), "model": str(model), "methods": "bitfit", "seeds": 1, "epochs": 1, "batch": 8, "baseline": False,
        "augment": "none", "workers": 1, "test": 0.25,
    }  # fmt: skip
    plain = compare(CompareConfig(out=tmp_path / "a", **settings))
    lion = compare(CompareConfig(out=tmp_path / "b", optimizer="lion", schedule="rex", min_lr_ratio=0.1, **settings))
    keys = [json.loads((out / "results.json").read_text())["runs"][0]["key"] for out in (plain, lion)]
    assert keys[0] != keys[1]


def test_a_config_file_has_the_new_options(tmp_path: Path) -> None:
    pytest.importorskip("tomlkit")
    config = PersonalizeConfig(
        with_=("a.safetensors:0.5",),
        block_lr={"unet.down": 0.5},
        optimizer_args={"betas": "0.9,0.99"},
        init_from=Path("b"),
        seed=3,
    )  # fmt: skip
    file = tmp_path / "run.toml"
    file.write_text(to_toml("personalize", config))
    assert 'with = ["a.safetensors:0.5"]' in file.read_text()
    flags = entries_of(read_config(["--config", str(file)]), PersonalizeConfig)
    again = PersonalizeConfig(**values(PersonalizeConfig, flags))
    for name in ("with_", "block_lr", "optimizer_args", "init_from", "seed"):
        assert getattr(again, name) == getattr(config, name), name
