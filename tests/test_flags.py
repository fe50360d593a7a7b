"""Flags from config classes: names, types, help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from veneer.control.config import ControlConfig
from veneer.flags import add_flags, help_of, values
from veneer.methods.reparameterized.low_rank.lora import LoRA
from veneer.training.personalization_config import PersonalizeConfig


@dataclass(frozen=True)
class Config:
    """Something to configure.

    Args:
        folder: where it lies; 50 % of
            all are there.
        rank, alpha: sizes.
        kind: which.

    Raises:
        ValueError: never; rank: is no argument here.
    """

    folder: Path
    rank: int = 4
    alpha: float | None = None
    kind: Literal["a", "b"] = "a"
    bias: bool = False
    words: str | tuple[str, ...] = ""
    names: tuple[str, ...] = ()
    where: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)


def parse(*words: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_flags(parser, Config, positional=("folder",))
    return values(Config, vars(parser.parse_args(words)))


def test_only_passed_fields_are_in_the_namespace() -> None:
    assert parse("x") == {"folder": Path("x")}


def test_a_positional_argument_is_optional_if_its_field_has_a_default(capsys: pytest.CaptureFixture[str]) -> None:
    """The usage shows which."""

    @dataclass(frozen=True)
    class Several:
        file: Path
        images: tuple[Path, ...] = ()
        prompt: str | None = None

    parser = argparse.ArgumentParser(prog="x")
    add_flags(parser, Several, positional=("file", "images", "prompt"))
    assert parser.format_usage().split("]", 1)[1].split() == ["file", "[images", "...]", "[prompt]"]
    assert values(Several, vars(parser.parse_args(["a"]))) == {"file": Path("a"), "images": ()}
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([])
    assert stop.value.code == 2
    assert "required: file" in capsys.readouterr().err


def test_types() -> None:
    given = "x --rank 8 --alpha 2 --kind b --bias --words one --size 4x3 --ranks mlp=2 attn.*=3"
    sizes = {"rank": 8, "alpha": 2.0, "size": (3, 4), "ranks": {"mlp": 2, "attn.*": 3}}
    assert parse(*given.split()) == {"folder": Path("x"), "kind": "b", "bias": True, "words": "one", **sizes}
    assert parse("x", "--names", "one", "--where", "attn") == {"folder": Path("x"), "names": ("one",), "where": ("attn",)}
    assert parse("x", "--words", "one", "two", "--no-bias") == {"folder": Path("x"), "words": ("one", "two"), "bias": False}


def test_size_is_width_by_height_or_the_side_of_a_square() -> None:
    assert parse("x", "--size", "768x512")["size"] == (512, 768)
    assert parse("x", "--size", "512")["size"] == (512, 512)
    for wrong in ("0x512", "512x", "512,768", "-1"):
        with pytest.raises(SystemExit):
            parse("x", f"--size={wrong}")


def test_options_by_site() -> None:
    @dataclass(frozen=True)
    class Sites:
        """Args:
        by_site: options.
        """

        by_site: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def by_site(*words: str) -> Any:
        parser = argparse.ArgumentParser()
        add_flags(parser, Sites)
        return values(Sites, vars(parser.parse_args(["--by-site", *words])))["by_site"]

    assert by_site("mlp.*:rank=4,alpha=2.5", "name:unet.conv_in:init=pissa", "mlp.*:rslora=true") == {
        "mlp.*": {"rank": 4, "alpha": 2.5, "rslora": True},
        "name:unet.conv_in": {"init": "pissa"},
    }
    for wrong in ("mlp", "mlp:rank", ":rank=3", "mlp:=3", "mlp:rank=3,"):
        with pytest.raises(SystemExit):
            by_site(wrong)


def test_help_may_name_another_field_before_a_colon() -> None:
    @dataclass(frozen=True)
    class Precision:
        """Two options.

        Args:
            autocast: autocast dtype: `no` or `bf16`. `seed`: of the
                dtype: any number.
            dtype: of the weights.
        """

        autocast: str = "no"
        dtype: str = "float32"
        seed: int = 0

    assert help_of(Precision) == {
        "autocast": "autocast dtype: `no` or `bf16`",
        "seed": "of the dtype: any number",
        "dtype": "of the weights",
    }


def test_help_of_an_inherited_field() -> None:
    assert "role pattern" in help_of(LoRA)["by_site"]


@pytest.mark.parametrize("words", [("x", "--kind", "c"), ("x", "--rank", "two"), ("x", "--ranks", "mlp"), ("x", "--unknown")])
def test_invalid_values_are_rejected(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[1] in capsys.readouterr().err


def test_help_is_the_docstring() -> None:
    found = help_of(Config)
    assert found == {"folder": "where it lies; 50 % of all are there", "rank": "sizes", "alpha": "sizes", "kind": "which"}


@pytest.mark.parametrize("config", [PersonalizeConfig, ControlConfig])
def test_help_of_timestep_sampling_names_the_sign_of_the_mean(config: type) -> None:
    """The sign differs from diffusers' scripts."""
    assert "`--logit_mean` has the other sign" in help_of(config)["timestep_sampling"]


def test_help_prints_percent_signs() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Config, positional=("folder",))
    assert "50 % of all" in " ".join(parser.format_help().split())


def test_prefixed_flags_and_short_aliases() -> None:
    parser = argparse.ArgumentParser()
    taken = add_flags(parser, Config, skip=("folder",), prefix="first")
    add_flags(parser, Config, skip=("folder",), prefix="second", taken=taken)
    found = vars(parser.parse_args(["--rank", "1", "--second.rank", "2"]))
    assert values(Config, found, "first") == {"rank": 1}
    assert values(Config, found, "second") == {"rank": 2}


SHARED = ("as for ", "shape of A", "`low_rank`", "`vector`")
"""Starts of texts that several fields share."""


def _configs() -> list[type]:
    from veneer.pipelines.bench import BenchConfig
    from veneer.pipelines.compare import CompareConfig
    from veneer.pipelines.control import ControlConfig, ControlGenerateConfig
    from veneer.pipelines.generate import GenerateConfig
    from veneer.pipelines.merge import MergeConfig
    from veneer.pipelines.personalize import PersonalizeConfig
    from veneer.pipelines.pretrain_base import PretrainConfig
    from veneer.pipelines.transfer import TransferConfig

    from veneer import methods

    commands = [
        BenchConfig, CompareConfig, ControlConfig, ControlGenerateConfig, GenerateConfig, MergeConfig, PersonalizeConfig,
        PretrainConfig, TransferConfig,
    ]  # fmt: skip
    return [*commands, *(methods.get(name) for name in methods.names())]


def test_every_flag_has_its_own_help_without_references_to_modules() -> None:
    for config in _configs():
        texts = [text for text in help_of(config).values() if not text.startswith(SHARED)]
        assert len(texts) == len(set(texts)), config.__name__
        if not config.__module__.startswith("veneer.methods"):
            assert [text for text in texts if re.search(r"None for|\bveneer\.\w", text)] == [], config.__name__
