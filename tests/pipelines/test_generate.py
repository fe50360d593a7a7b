"""Generation with adapters: files, settings in them, strengths, and comparison with the base model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from veneer.pipelines.convert import base_of
from veneer.pipelines.generate import GenerateConfig, generate

import veneer
from tests.raising import raises
from veneer.base_models.devices import resolve_dtype
from veneer.formats import native
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.fixed_adapters import parse_adapter
from veneer.training.report.png_metadata import read_settings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A saved base model, and an adapter for it with an effect."""
    folder = tmp_path_factory.mktemp("made")
    pipe = tiny_pipeline("sd")
    pipe.save_pretrained(folder / "base")
    attached = veneer.attach(pipe, "lora")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_(std=0.3)
    attached.save(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter.safetensors")


def test_a_file_that_records_a_former_name_of_the_bundled_base_names_the_bundled_base(tmp_path: Path) -> None:
    attached = veneer.attach(tiny_pipeline("sd"), "lora")
    for recorded, expected in (("shipped", "bundled"), ("bundled", "bundled"), ("owner/model", "owner/model"), (3, None)):
        assert base_of(native.save(attached, tmp_path / f"{recorded}".replace("/", "-"), {"base": recorded})) == expected


def draw(made: tuple[str, str], out: Path, *adapter: str, **settings: object) -> list[np.ndarray]:
    config = GenerateConfig(adapter=adapter, base=made[0], steps=2, out=out, **{"prompt": ("a cat",), **settings})  # type: ignore[arg-type]
    return [np.asarray(Image.open(path), dtype=int) for path in generate(config)]


def test_strength_zero_is_the_base_and_one_is_not(made: tuple[str, str], tmp_path: Path) -> None:
    base, none, full = (draw(made, tmp_path / str(i), *given)[0] for i, given in enumerate([(), (f"{made[1]}:0",), (made[1],)]))
    assert np.array_equal(base, none)
    assert not np.array_equal(base, full)


def test_a_token_of_each_layer_is_loaded_and_scaled(made: tuple[str, str], tmp_path: Path) -> None:
    """Also beside a file of another token."""
    pipe = veneer.base_models.load(made[0])
    files = []
    for token in ("<toy>", "<other>"):
        tuned = veneer.attach(pipe, "p_plus", tokens=token, initialize="duck")
        torch.manual_seed(0)
        with torch.no_grad():
            next(iter(tuned.parameters())).normal_()
        files.append(str(tuned.save(tmp_path / token[1:-1])))
        tuned.detach()
    prompts = {"prompt": ("a <toy>",)}
    off, on, both = (
        draw(made, tmp_path / str(i), *adapters, **prompts)[0]
        for i, adapters in enumerate([(f"{files[0]}:0",), (files[0],), files])
    )
    assert not np.array_equal(off, on)
    assert np.abs(on - both).max() <= 1


def test_two_adapters_work_together(made: tuple[str, str], tmp_path: Path) -> None:
    once, twice = draw(made, tmp_path / "1", made[1]), draw(made, tmp_path / "2", f"{made[1]}:0.5", f"{made[1]}:0.5")
    assert np.abs(once[0] - twice[0]).max() <= 1, "two halves of one adapter are the adapter"


def test_settings_are_in_the_image(made: tuple[str, str], tmp_path: Path) -> None:
    config = GenerateConfig(
        ("a cat", "a dog"), (f"{made[1]}:0.5",), base=made[0], steps=2, images_per_prompt=2, seed=7, out=tmp_path
    )
    files = generate(config)
    assert len(files) == 4
    found = read_settings(files[1])
    assert (found["prompt"], found["seed"], found["steps"]) == ("a cat", 8, 2)
    assert found["adapters"] == [{"file": made[1], "scale": 0.5}]


def test_files_are_never_overwritten(made: tuple[str, str], tmp_path: Path) -> None:
    config = GenerateConfig(("a cat",), base=made[0], steps=1, out=tmp_path)
    assert set(generate(config)).isdisjoint(generate(config))


def test_without_puts_the_base_beside(made: tuple[str, str], tmp_path: Path) -> None:
    files = generate(GenerateConfig(("a cat",), (made[1],), base=made[0], steps=1, side_by_side=True, out=tmp_path))
    assert files[-1].name == "sheet.png"
    with Image.open(files[-1]) as sheet:
        assert sheet.width > sheet.height / 2


@pytest.mark.parametrize("text", ["nowhere", "nowhere:0.5", "nowhere:high"])
def test_an_adapter_that_is_not_there(text: str) -> None:
    with raises(OptionError, option="adapter", given=text):
        parse_adapter(text)


def test_a_prompt_that_is_too_long_is_shortened_and_says_so(
    made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [file] = generate(GenerateConfig(("a cat " + "very " * 90 + "last",), base=made[0], steps=1, out=tmp_path))
    assert "last" in capsys.readouterr().out
    assert 10 < read_settings(file)["prompt"].count("very") < 90


def test_the_base_model_is_in_the_dtype_that_was_asked_for(made: tuple[str, str], tmp_path: Path) -> None:
    exact, rounded = (draw(made, tmp_path / dtype, made[1], dtype=dtype)[0] for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(exact - rounded).mean() < 10


def test_the_default_dtype_depends_on_the_device() -> None:
    assert resolve_dtype(None, "cpu") == torch.float32
    assert resolve_dtype(None, torch.device("cuda", 1)) == torch.bfloat16
    assert resolve_dtype("float16", "cpu") == torch.float16
