"""diffusers' old layouts, which diffusers itself still reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats.cases import deltas
from tests.formats.low_rank import assert_same, in_peft
from tests.raising import raises
from veneer.formats import diffusers_old, format_of, read
from veneer.injection import LoadError, SaveError, attach
from veneer.injection.sites import WeightSite
from veneer.injection.towers import towers_of
from veneer.testing.pipelines import tiny_pipeline

Spelling = Callable[[str], str]


def in_processors(path: str) -> str:
    """Of 2023: `….attn1.processor.to_q_lora`, in text encoders `….self_attn.to_q_lora`."""
    path = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1_lora", path)
    return re.sub(r"\.(q|k|v|out)_proj$", r".to_\1_lora", path)


def beside_layers(path: str) -> str:
    """From 0.22 on: `….attn1.to_q.lora`, in text encoders `….q_proj.lora_linear_layer`."""
    return f"{path}.lora" if path.startswith(("unet.", "transformer.")) else f"{path}.lora_linear_layer"


def made(path: Path, family: str, roles: tuple[str, ...], spelt: Spelling) -> None:
    generator = torch.Generator().manual_seed(3)
    state: dict[str, Tensor] = {}
    for tower in towers_of(tiny_pipeline(family)):
        for site in tower.sites:
            if isinstance(site, WeightSite) and site.role.startswith(roles) and not site.component.endswith("3"):
                component, _, rest = site.name.partition(".")
                inside = f"text_model.{rest.removeprefix('text_model.')}" if component.startswith("text_encoder") else rest
                name = spelt(f"{component}.{inside}")
                ones = (1,) * len(site.kernel)
                down = torch.randn(3, *site.weight_shape[1:], generator=generator)
                state |= {
                    f"{name}.down.weight": down,
                    f"{name}.up.weight": torch.randn(site.d_out, 3, *ones, generator=generator),
                }
    save_file(state, path)


@pytest.mark.parametrize(
    ("family", "roles", "spelt"),
    [
        ("sd", ("attn.", "xattn."), in_processors),
        ("sdxl", ("attn.", "xattn."), in_processors),
        ("sd", ("attn.", "xattn.", "mlp.", "conv.res", "proj.", "conv.io"), beside_layers),
        ("sdxl", ("attn.", "xattn."), beside_layers),
    ],
)
def test_diffusers_makes_the_same_change(
    tmp_path: Path, family: str, roles: tuple[str, ...], spelt: Callable[[str], str]
) -> None:
    made(tmp_path / "x.safetensors", family, roles, spelt)
    assert format_of(read(tmp_path / "x")).name == "diffusers_old"
    plain = tiny_pipeline(family)
    plain.load_lora_weights(tmp_path / "x.safetensors")
    loaded = veneer.load(tiny_pipeline(family), tmp_path / "x")
    assert_same(deltas(loaded), in_peft(plain.components))
    assert "alpha" not in str(loaded.loaded)


def test_the_unet_alone_without_its_name(tmp_path: Path) -> None:
    """`save_attn_procs`: original keys."""
    made(tmp_path / "x.safetensors", "sd", ("attn.", "xattn."), in_processors)
    state = {k.removeprefix("unet."): t for k, t in load_file(tmp_path / "x.safetensors").items() if k.startswith("unet.")}
    save_file(state, tmp_path / "y.safetensors")
    plain = tiny_pipeline("sd")
    plain.unet.load_lora_adapter(state, prefix=None)
    want = in_peft(plain.components)
    assert_same(deltas(veneer.load(tiny_pipeline("sd"), tmp_path / "y")), want)
    bare = veneer.load(tiny_pipeline("sd").unet, tmp_path / "y")
    assert_same({f"unet.{name}": delta for name, delta in deltas(bare).items()}, want)


def test_of_another_model_and_read_only(tmp_path: Path) -> None:
    made(tmp_path / "x.safetensors", "sd", ("attn.",), in_processors)
    with pytest.raises(LoadError) as caught:
        veneer.load(tiny_pipeline("sd3"), tmp_path / "x")
    keys = load_file(tmp_path / "x.safetensors")
    assert set(caught.value.unused) == {key for key in keys if key.startswith("unet.")}
    with raises(SaveError, given="diffusers_old", expected=("diffusers",)):
        diffusers_old.save(attach(tiny_pipeline("sd"), "lora", rank=2), tmp_path / "y")
