"""LoRA in kohya's layout: diffusers, peft and LyCORIS have equal weight updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats import low_rank
from tests.formats.cases import deltas, fill, header
from tests.formats.low_rank import OPTIONS, assert_same, expected, in_peft
from tests.injection.toy import net
from tests.raising import raises
from veneer.formats import kohya
from veneer.formats._names.kohya import named_layers
from veneer.injection import LoadError, SaveError, attach
from veneer.injection.towers import towers_of
from veneer.testing.pipelines import tiny_pipeline

peft = pytest.importorskip("peft", reason="diffusers loads LoRA through peft")

UNET = ["attn", "xattn", "mlp", "proj", "conv", "time"]
WHERE: dict[str, list[str]] = {
    "sd": [*UNET, "text/attn", "text/mlp"],
    "sd2": [*UNET, "text/attn"],
    "sdxl": [*UNET, "text/attn", "text_2/attn", "text_2/mlp"],
    "flux": ["attn.q", "attn.k", "attn.v", "attn.out", "attn.context", "mlp", "adaln", "text/attn", "text/mlp"],
}
# diffusers reads files of UNets with one alpha only: it drops those of attention layers that have another one
ONE_ALPHA: dict[str, Any] = {"rank": 3, "alpha": 2.0, "by_site": {"*.v": {"rank": 5}, "mlp": {"rank": 2}}}


def tuned(family: str, where: Any = None, **options: Any) -> veneer.Attachment:
    return low_rank.tuned(family, where or WHERE[family], **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The file of a family, and ΔW of every site in it."""
    made: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def get(family: str) -> tuple[Path, dict[str, Tensor]]:
        if family not in made:
            attachment = tuned(family)
            made[family] = kohya.save(attachment, tmp_path_factory.mktemp(family)), expected(attachment)
        return made[family]

    return get


# against other readers and writers


@pytest.mark.parametrize("family", list(WHERE))
def test_diffusers_makes_the_same_change_of_every_weight(tmp_path: Path, family: str) -> None:
    where = (
        [f"{w}@0:1" for w in WHERE["flux"]] if family == "flux" else None
    )  # without single blocks, of which it knows one width
    attachment = tuned(family, where, **(OPTIONS if family == "flux" else ONE_ALPHA))
    want = expected(attachment) if family == "flux" else deltas(attachment)
    pipe = tiny_pipeline(family)
    pipe.load_lora_weights(kohya.save(attachment, tmp_path / "x"))
    assert_same(in_peft(pipe.components), want)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_tensors_alone_give_the_change(files: Any, family: str) -> None:
    """alpha / r · B A of each module, with another alpha and rank by role, rank-stabilized."""
    path, want = files(family)
    state = load_file(path)
    written = {p.names[0]: p.sites[0].name for t in towers_of(tiny_pipeline(family)) for p in named_layers(t, family == "sdxl")}
    got = {}
    for name in {k.partition(".")[0] for k in state}:
        down, up, alpha = (state[f"{name}.{part}"].double() for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        change = float(alpha) / len(down) * up.flatten(1) @ down.flatten(1)
        got[written[name]] = change.reshape(want[written[name]].shape)
    assert_same(got, want)


@pytest.mark.parametrize("family", list(WHERE))
def test_read_back_it_is_the_same_change(files: Any, family: str) -> None:
    path, want = files(family)
    loaded = veneer.load(tiny_pipeline(family), path)
    assert_same(deltas(loaded), want)
    assert loaded.loaded.clean
    assert loaded.loaded.notes == ()


@pytest.mark.parametrize("family", list(WHERE))
def test_reading_and_writing_again_keeps_every_byte(files: Any, family: str, tmp_path: Path) -> None:
    path, _ = files(family)
    assert kohya.save(veneer.load(tiny_pipeline(family), path), tmp_path / "again").read_bytes() == path.read_bytes()


def test_what_diffusers_writes_in_this_layout(tmp_path: Path) -> None:
    """`convert_state_dict_to_kohya`: the first text encoder is `lora_te1`, also in SD 1."""
    pipe = tiny_pipeline("sd")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0", "conv1"], init_lora_weights=False)
    text = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    peft.inject_adapter_in_model(text, pipe.text_encoder)
    state = {f"unet.{k}": t for k, t in peft.get_peft_model_state_dict(pipe.unet).items()}
    state |= {f"text_encoder.text_model.{k}": t for k, t in peft.get_peft_model_state_dict(pipe.text_encoder).items()}
    save_file({k: t.contiguous() for k, t in convert_state_dict_to_kohya(state).items()}, tmp_path / "x.safetensors")
    assert_same(deltas(veneer.load(tiny_pipeline("sd"), tmp_path / "x")), in_peft(pipe.components))


@pytest.mark.parametrize("kernel", [1, 3])
def test_tucker_as_lycoris_computes_it(tmp_path: Path, kernel: int) -> None:
    """`lora_mid` between 1×1 convolutions; LyCORIS gives the weight update."""
    locon = pytest.importorskip("lycoris.modules.locon", reason="LyCORIS is not installed")
    pipe = tiny_pipeline("sd")
    path = "down_blocks.0.resnets.0.conv1" if kernel == 3 else "mid_block.attentions.0.proj_in"
    name = f"lora_unet_{path.replace('.', '_')}"
    module = locon.LoConModule(name, pipe.unet.get_submodule(path), 1.0, 3, alpha=2.0, use_tucker=True)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    state = {f"{name}.{k}": t.detach().clone() for k, t in module.state_dict().items() if k in kohya.PARTS}
    assert any("lora_mid" in k for k in state) == (kernel == 3)
    save_file(state, tmp_path / "x.safetensors")
    want = module.make_weight().detach().double() * module.scale
    assert_same(deltas(veneer.load(tiny_pipeline("sd"), tmp_path / "x")), {f"unet.{path}": want})


# alphas


def test_without_alpha_it_is_the_rank(files: Any, tmp_path: Path) -> None:
    path, _ = files("sd")
    save_file({k: t for k, t in load_file(path).items() if not k.endswith("alpha")}, tmp_path / "bare.safetensors")
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(tmp_path / "bare.safetensors")
    loaded = veneer.load(tiny_pipeline("sd"), tmp_path / "bare")
    assert_same(deltas(loaded), in_peft(plain.components))
    assert "no alpha in" in str(loaded.loaded)


def test_a_scale_of_zero_is_written_as_no_change(tmp_path: Path) -> None:
    attachment = tuned("sd", "attn.q", rank=2, alpha=0.0)
    state = load_file(kohya.save(attachment, tmp_path / "x"))
    assert all(float(t) != 0 for k, t in state.items() if k.endswith("alpha"))
    assert not any(t.any() for k, t in state.items() if "lora_up" in k)


# other bases and spellings


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_both_spellings_are_read(files: Any, family: str, tmp_path: Path) -> None:
    path, want = files(family)
    other = {n: place.names[-1] for t in towers_of(tiny_pipeline(family)) for place in named_layers(t) for n in place.names}
    state = {
        f"{other.get(k.partition('.')[0], k.partition('.')[0])}.{k.partition('.')[2]}": t for k, t in load_file(path).items()
    }
    assert any("input_blocks" in k for k in state) == (family == "sd")
    save_file(state, tmp_path / "x.safetensors")
    assert_same(deltas(veneer.load(tiny_pipeline(family), tmp_path / "x")), want)


def test_linear_layers_where_the_base_has_convolutions_of_one_pixel(files: Any, tmp_path: Path) -> None:
    path, want = files("sd")
    state = {k: t.flatten(1) if "proj_in" in k and t.ndim > 1 else t for k, t in load_file(path).items()}
    save_file(state, tmp_path / "x.safetensors")
    assert_same(deltas(veneer.load(tiny_pipeline("sd"), tmp_path / "x")), want)


def test_a_bare_unet_and_bare_text_encoders(files: Any, tmp_path: Path) -> None:
    attachment = fill(attach(tiny_pipeline("sdxl").unet, "lora", rank=2))
    plain = tiny_pipeline("sdxl")
    plain.load_lora_weights(kohya.save(attachment, tmp_path / "unet"))
    assert_same(in_peft(plain.components), {f"unet.{k}": d for k, d in deltas(attachment).items()})
    for component, prefix in (("text_encoder", "lora_te_"), ("text_encoder_2", "lora_te2_")):
        tower = getattr(tiny_pipeline("sdxl"), component)
        path = kohya.save(fill(attach(tower, "lora", rank=2, where="attn")), tmp_path / component)
        assert all(k.startswith(prefix) for k in load_file(path))
        assert_same(deltas(veneer.load(getattr(tiny_pipeline("sdxl"), component), path)), deltas(veneer.attachments(tower)[0]))


PREFIXES = {"sd": "lora_te", "sd2": "lora_te", "sdxl": "lora_te1", "sd3": "lora_te1", "flux": "lora_te1"}


@pytest.mark.parametrize(("family", "prefix"), PREFIXES.items())
def test_the_first_text_encoder_alone_has_its_number_where_there_are_several(tmp_path: Path, family: str, prefix: str) -> None:
    """As sd-scripts and other tools name it, which count the pipeline's text encoders."""
    path = kohya.save(tuned(family, "text/attn.q", rank=2), tmp_path / "x")
    assert {key.split("_text_model")[0] for key in load_file(path)} == {prefix}


def test_what_other_tools_look_for_in_the_header(files: Any) -> None:
    found = {family: header(files(family)[0])["__metadata__"] for family in WHERE}
    assert {f: m["ss_base_model_version"] for f, m in found.items()} == {
        "sd": "sd_v1",
        "sd2": "sd_v2",
        "sdxl": "sdxl_base_v1-0",
        "flux": "flux1",
    }
    assert (found["sd2"]["ss_v2"], found["sdxl"]["ss_v2"]) == ("True", "False")
    prefixes = {f: {k.split("_text_model")[0] for k in header(files(f)[0]) if k.startswith("lora_te")} for f in WHERE}
    assert prefixes == {"sd": {"lora_te"}, "sd2": {"lora_te"}, "sdxl": {"lora_te1", "lora_te2"}, "flux": {"lora_te1"}}


# what is refused


@pytest.mark.parametrize(
    ("part", "given"),
    [
        ("diff", "full weights"),
        ("w_norm", "norms"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_other_changes_in_this_layout_are_rejected(files: Any, tmp_path: Path, part: str, given: str, strict: bool) -> None:
    state = load_file(files("sd")[0])
    name = next(iter(state)).partition(".")[0]
    save_file({**state, f"{name}.{part}": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    pipe = tiny_pipeline("sd")
    with raises(LoadError, where=f"{name}.{part}", given=given):
        veneer.load(pipe, tmp_path / "x", strict=strict)
    assert veneer.attachments(pipe) == []


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
SITE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
GOOD = {f"{Q}.lora_down.weight": torch.ones(2, 16), f"{Q}.lora_up.weight": torch.ones(16, 2), f"{Q}.alpha": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("changed", "data"),
    [
        ({f"{Q}.alpha": torch.tensor(0.0)}, {"where": f"{Q}.alpha", "given": 0.0}),
        ({f"{Q}.alpha": torch.ones(2)}, {"where": f"{Q}.alpha", "given": (2,)}),
        ({f"{Q}.alpha": torch.tensor(float("nan"))}, {"given": (f"{Q}.alpha",), "expected": "finite"}),
        ({f"{Q}.lora_up.weight": None}, {"unused": (f"{Q}.alpha", f"{Q}.lora_down.weight")}),
        ({f"{Q}.lora_up.weight": torch.ones(16, 3)}, {"unused": tuple(sorted(GOOD))}),
        (
            {f"{Q}.lora_down.weight": torch.ones(0, 16), f"{Q}.lora_up.weight": torch.ones(16, 0)},
            {"unused": tuple(sorted(GOOD))},
        ),
        ({f"{Q}.lora_down.weight": torch.tensor(1.0)}, {"unused": tuple(sorted(GOOD))}),
        ({f"{Q}.lora_down.weight": torch.ones(2, 17)}, {"misshapen": {f"{SITE}:down": ((2, 17), (2, 16))}}),
        ({f"{Q}.lora_mid.weight": torch.ones(2, 3, 3, 3)}, {"where": f"{Q}.lora_mid.weight", "given": (2, 3, 3, 3)}),
        (
            {"lora_unet_elsewhere.lora_down.weight": torch.ones(2, 2)},
            {"unused": ("lora_unet_elsewhere.lora_down.weight",)},
        ),
        ({"elsewhere.toy": torch.ones(2)}, {"unused": ("elsewhere.toy",)}),
    ],
    ids=["alpha-0", "alphas", "alpha-nan", "half", "ranks", "rank-0", "scalar", "width", "mid", "elsewhere", "other"],
)
def test_incomplete_files(tmp_path: Path, changed: dict[str, Tensor | None], data: dict[str, Any]) -> None:
    save_file({k: t for k, t in {**GOOD, **changed}.items() if t is not None}, tmp_path / "x.safetensors")
    pipe = tiny_pipeline("sd")
    with raises(LoadError, **data):
        veneer.load(pipe, tmp_path / "x")
    assert veneer.attachments(pipe) == []


def test_not_strict_loads_compatible_tensors_and_reports_the_rest(tmp_path: Path) -> None:
    save_file({**GOOD, "lora_unet_elsewhere.lora_down.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    report = veneer.load(tiny_pipeline("sd"), tmp_path / "x", strict=False).loaded
    assert (len(report.used), report.unused) == (2, ("lora_unet_elsewhere.lora_down.weight",))


def test_another_base_is_named(files: Any) -> None:
    with pytest.raises(LoadError) as caught:
        veneer.load(tiny_pipeline("flux"), files("sd")[0])
    assert set(caught.value.unused) == {key for key in load_file(files("sd")[0]) if key.startswith("lora_unet")}
    with pytest.raises(LoadError) as caught:
        veneer.load(tiny_pipeline("sd", block_out_channels=(16, 48)), files("sd")[0])
    assert caught.value.misshapen
    assert all(key.startswith("unet.") for key in caught.value.misshapen)
    wide = tiny_pipeline("flux", num_attention_heads=4)
    with raises(LoadError, where="lora_unet_double_blocks_0_img_attn_qkv") as caught:
        veneer.load(wide, files("flux")[0])
    ((given, expected),) = caught.value.misshapen.values()
    assert (given[0], expected[0]) == (96, 192)


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: [], {"given": 0, "expected": 1}),
        (lambda: attach(tiny_pipeline("sd"), "bitfit"), {"where": "bitfit", "given": "bitfit", "expected": "lora"}),
        (lambda: attach(tiny_pipeline("sd"), "lora", train="norm"), {"where": "lora", "expected": ()}),
        (lambda: attach(tiny_pipeline("sd"), "lora", where="text/embed.token"), {"given": "embedding"}),
        (lambda: attach(tiny_pipeline("pixart"), "lora"), {"given": "PixArtTransformer2DModel"}),
        (lambda: attach(net(), "lora", where="head"), {"where": "head", "given": "Net"}),
        (lambda: whole(), {"given": "fused"}),
    ],
    ids=["nothing", "method", "trained", "embedding", "pixart", "toy", "whole"],
)
def test_what_the_layout_cannot_hold_is_rejected(tmp_path: Path, make: Callable[[], Any], data: dict[str, Any]) -> None:
    with raises(SaveError, **data):
        kohya.save(make(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def whole() -> veneer.Attachment:
    pipe = tiny_pipeline("sd")
    pipe.fuse_qkv_projections()
    return attach(pipe, "lora", where="attn.qkv", rank=2)


def test_one_weight_adapted_twice_is_rejected(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    both = [attach(pipe, "lora", where="attn.q", rank=2) for _ in range(2)]
    with raises(SaveError, given=2, expected=1) as caught:
        kohya.save(both, tmp_path / "x")
    assert caught.value.where.startswith("lora_unet_down_blocks_0")
