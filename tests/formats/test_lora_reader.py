"""Conversions from every format to every other that can hold it keep the weight updates."""

from __future__ import annotations

import functools
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.formats.cases import fill
from tests.raising import raises
from veneer.formats import convert, formats, load_all
from veneer.injection import Attachment, SaveError, attach
from veneer.testing.pipelines import tiny_pipeline


def in_turn(several: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each format with the next one, the last one with the first."""
    return [*zip(several, (*several[1:], several[0]), strict=True)]


LORA = ("native", "kohya", "diffusers", "comfyui", "onetrainer")
# what LoRA is put on, and the formats that have names for it
WHERE: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "sd": (["attn", "xattn.v", "conv.res", "text/attn"], LORA),
    "sdxl": (["attn.q", "mlp.in", "text/attn.q", "text_2/attn.v"], LORA),
    "sd3": (["attn.{q,k,v}", "mlp.out", "adaln", "text/attn.q"], LORA),
    "flux": (["attn", "single.out"], (*LORA, "xlabs", "peft_folder")),
    "pixart": (["attn.q", "xattn.{k,v}", "mlp"], ("native", "diffusers", "comfyui", "onetrainer", "peft_folder")),
    "dit": (["attn", "mlp"], ("native", "diffusers", "peft_folder")),
}
# every pair of formats that can hold a UNet; other families are read from and written to each of their formats once
PAIRS = [("sd", *pair) for pair in permutations(LORA, 2)]
PAIRS += [(family, *pair) for family, (_, some) in WHERE.items() if family != "sd" for pair in in_turn(some)]
# of other methods, where they are the same function in two formats
OTHERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dora": ({"rank": 2, "alpha": 3.0}, ("native", "lycoris", "diffusers", "peft_folder")),
    "dora-input": ({"rank": 2, "alpha": 3.0, "norm_axis": "input"}, ("native", "lycoris")),
    "loha-dora": ({"rank": 2, "alpha": 3.0, "norm_axis": "input"}, ("native", "lycoris")),
    "lokr-dora": ({"factor": 4, "rank": 1, "norm_axis": "output"}, ("native", "lycoris")),
    "loha": ({"rank": 2, "alpha": 3.0}, ("native", "lycoris", "peft_folder")),
    "lokr": ({"factor": 4, "rank": 1, "alpha": 3.0}, ("native", "lycoris", "peft_folder")),
    "ia3": ({}, ("native", "lycoris", "peft_folder")),
}
OTHER_PAIRS = [(method, *pair) for method, (_, some) in OTHERS.items() for pair in in_turn(some)]


def changes(before: dict[str, torch.Tensor], attached: list[Attachment]) -> dict[str, torch.Tensor]:
    """Weight updates by merging the adapters; nothing stays attached."""
    for attachment in attached:
        attachment.merge()
    after = {f"{c}.{k}": t.clone() for a in attached for c in a.towers for k, t in a.host_state_dict(c).items()}
    for attachment in reversed(attached):
        attachment.unmerge()
        attachment.detach()
    return {name: t - before[name] for name, t in after.items() if not torch.equal(t, before[name])}


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    modules = {c: m for c, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {f"{c}.{k}": t.clone() for c, m in modules.items() for k, t in m.state_dict().items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file of a family (or a method) in a format, written by veneer's attachment itself."""
    made: dict[tuple[str, str], Path] = {}

    def get(key: str, form: str) -> Path:
        if (key, form) not in made:
            family, method, options, where = case(key)
            tuned = fill(attach(tiny_pipeline(family), method, where=where, **options), std=0.2)
            made[key, form] = formats.get(form)().save(tuned, tmp_path_factory.mktemp(key) / form)
        return made[key, form]

    return get


@pytest.fixture(scope="module")
def wanted() -> Any:
    """A pipeline, its weights, and the weight updates of the attachment of a family (or a method); nothing is attached."""

    @functools.cache
    def get(key: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        family, method, options, where = case(key)
        pipe = tiny_pipeline(family)
        base = weights(pipe)
        return pipe, base, changes(base, [fill(attach(pipe, method, where=where, **options), std=0.2)])

    return get


def case(key: str) -> tuple[str, str, dict[str, Any], list[str]]:
    if key in WHERE:
        return key, "lora", {"rank": 3, "alpha": 2.0, "by_site": {"*.v": {"rank": 2}, "*.q": {"alpha": 5.0}}}, WHERE[key][0]
    return "sd", key.partition("-")[0], OTHERS[key][0], ["attn.{k,v}"] if key == "ia3" else ["attn.q", "xattn.v"]


@pytest.mark.parametrize(("key", "form", "to"), [*PAIRS, *OTHER_PAIRS], ids=lambda v: v)
def test_converted_it_changes_every_weight_as_before(
    files: Any, wanted: Any, tmp_path: Path, key: str, form: str, to: str
) -> None:
    pipe, base, want = wanted(key)
    done = convert(pipe, files(key, form), to, tmp_path / "out")
    assert veneer.attachments(pipe) == []
    got = changes(base, load_all(pipe, done.files[0]))
    assert got.keys() == want.keys()
    assert len(want) == done.weights
    for name, change in want.items():
        assert change.abs().max() > 1e-4, name
        torch.testing.assert_close(got[name], change, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("family", "to", "given"),
    [
        ("sd3", "xlabs", "SD3Transformer2DModel"),
        ("pixart", "kohya", "PixArtTransformer2DModel"),
        ("dit", "comfyui", "DiTTransformer2DModel"),
        ("sd", "peft_folder", ("unet", "text_encoder")),
        ("dora-input", "diffusers", {"norm_axis": "input"}),
        ("dora-input", "peft_folder", {"norm_axis": "input"}),
        ("loha-dora", "peft_folder", {"norm_axis": "input"}),
        ("lokr-dora", "peft_folder", {"norm_axis": "output"}),
    ],
)
def test_what_the_other_format_cannot_hold_is_not_saved(files: Any, tmp_path: Path, family: str, to: str, given: Any) -> None:
    with raises(SaveError, given=given):
        convert(tiny_pipeline(case(family)[0]), files(family, "native"), to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
