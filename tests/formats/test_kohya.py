"""LoRA in kohya's layout: diffusers, peft and LyCORIS agree about the change of every weight; names are those of real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from veneer.formats import kohya
from veneer.formats._kohya_fused import Pair, split
from veneer.formats._kohya_names import Place, places
from veneer.injection import LoadError, SaveError, attach
from veneer.injection.sites import WeightSite
from veneer.injection.towers import towers_of
from veneer.testing.pipelines import tiny_pipeline

from ..hosts import published
from ..injection.toy import net
from .cases import deltas, fill, header

peft = pytest.importorskip("peft", reason="diffusers loads LoRA through peft")

UNET = ["attn", "xattn", "mlp", "proj", "conv", "time"]
WHERE: dict[str, list[str]] = {
    "sd": [*UNET, "text/attn", "text/mlp"],
    "sd2": [*UNET, "text/attn"],
    "sdxl": [*UNET, "text/attn", "text_2/attn", "text_2/mlp"],
    "flux": ["attn.q", "attn.k", "attn.v", "attn.out", "attn.context", "mlp", "adaln", "text/attn", "text/mlp"],
}
OPTIONS: dict[str, Any] = {"rank": 3, "alpha": 2.0, "ranks": {"*.v": 5, "mlp": 2}, "alphas": {"*.q": 7.0}, "rslora": True}
# diffusers reads files of UNets with one alpha only: it drops those of attention layers that have another one
ONE_ALPHA: dict[str, Any] = {"rank": 3, "alpha": 2.0, "ranks": {"*.v": 5, "mlp": 2}}


def tuned(family: str, where: Any = None, **options: Any) -> veneer.Attachment:
    return fill(attach(tiny_pipeline(family), "lora", where=where or WHERE[family], **(options or OPTIONS)), std=0.2)


def expected(attachment: veneer.Attachment) -> dict[str, Tensor]:
    """ΔW from the tensors and `OPTIONS`, with the rules of the papers written out."""
    found: dict[str, Tensor] = {}
    for name, (site, adapter) in attachment.parts.items():
        down, up = adapter.down.detach().double(), adapter.up.detach().double()
        alpha = 7.0 if site.role.endswith(".q") else 2.0
        found[name] = alpha / down.shape[0] ** 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(site.weight_shape)
    return found


def in_peft(pipe: Any) -> dict[str, Tensor]:
    """ΔW of every layer that peft has injected, by site name."""
    found: dict[str, Tensor] = {}
    for component, tower in pipe.components.items():
        for name, module in tower.named_modules() if isinstance(tower, nn.Module) else ():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                (adapter,) = module.lora_A
                found[f"{component}.{name}"] = module.get_delta_weight(adapter).detach().double()
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, delta in want.items():
        assert delta.abs().max() > 1e-3, name
        torch.testing.assert_close(got[name], delta, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


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
    assert_same(in_peft(pipe), want)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_tensors_alone_give_the_change(files: Any, family: str) -> None:
    """alpha / r · B A of each module, with another alpha and rank by role, rank-stabilised."""
    path, want = files(family)
    state = load_file(path)
    written = {p.names[0]: p.sites[0].name for t in towers_of(tiny_pipeline(family)) for p in places(t, family == "sdxl")}
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
    assert_same(deltas(veneer.load(tiny_pipeline("sd"), tmp_path / "x")), in_peft(pipe))


@pytest.mark.parametrize("kernel", [1, 3])
def test_tucker_as_lycoris_reckons_it(tmp_path: Path, kernel: int) -> None:
    """`lora_mid` between 1×1 convolutions; LyCORIS gives the change of the weight."""
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


# names of real models


def tower_of(name: str) -> Any:
    (tower,) = towers_of(published.build(name))
    return tower


def offered(tower: Any) -> dict[str, WeightSite]:
    return {s.name: s for s in tower.sites if isinstance(s, WeightSite) and s.kind != "embedding"}


def by_site(found: list[Place]) -> dict[str, tuple[str, ...]]:
    return {place.sites[0].name: place.names for place in found}


def rule_of_sd_scripts(model: nn.Module, prefix: str, inside: tuple[str, ...], root: str = "") -> dict[str, str]:
    """Every linear and convolution below modules of these classes, its path with underscores."""
    found = {}
    for path, module in model.named_modules():
        if type(module).__name__ in inside:
            for below, layer in module.named_modules():
                if type(layer).__name__ in ("Linear", "Conv2d"):
                    found[f"{path}.{below}"] = f"{prefix}_{root}{path}_{below}".replace(".", "_")
    return found


@pytest.mark.parametrize(("base", "count", "with_convs"), [("sd15", 192, 278), ("sd21", 192, 278)])
def test_names_of_sd_are_those_of_sd_scripts(base: str, count: int, with_convs: int) -> None:
    tower = tower_of(base)
    written = {site: names[0] for site, names in by_site(places(tower)).items()}
    attention = rule_of_sd_scripts(tower.module, "lora_unet", ("Transformer2DModel",))
    convolutions = rule_of_sd_scripts(tower.module, "lora_unet", ("ResnetBlock2D", "Downsample2D", "Upsample2D"))
    assert (len(attention), len(attention | convolutions)) == (count, with_convs)
    assert (attention | convolutions).items() <= written.items()
    assert written.keys() == offered(tower).keys()


@pytest.mark.parametrize(("base", "prefix", "count"), [("clip_l", "lora_te", 72), ("clip_bigg", "lora_te2", 192)])
def test_names_of_text_encoders_are_those_of_sd_scripts(base: str, prefix: str, count: int) -> None:
    tower = tower_of(base)
    root = "" if hasattr(tower.module, "text_model") else "text_model_"
    rule = rule_of_sd_scripts(tower.module, prefix, ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"), root)
    written = {site: names[0] for site, names in by_site(places(tower)).items()}
    assert len(rule) == count
    assert rule.items() <= written.items()


def test_names_of_sdxl() -> None:
    """Names that are in published files, and every site's through diffusers' converter back to its own path."""
    tower = tower_of("sdxl")
    names = by_site(places(tower))
    known = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
        ),
        "lora_unet_input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"
        ),
        "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_out_0": (
            "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
        ),
        "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "lora_unet_output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "lora_unet_input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "lora_unet_middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "lora_unet_output_blocks_8_0_out_layers_3": "up_blocks.2.resnets.2.conv2",
        "lora_unet_input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
        "lora_unet_label_emb_0_2": "add_embedding.linear_2",
        "lora_unet_out_2": "conv_out",
    }
    assert {names[path][0]: path for path in known.values()} == known
    assert names.keys() == offered(tower).keys()
    inside = [path for path in names if path.startswith(("down_blocks", "mid_block", "up_blocks"))]
    assert (len([path for path in inside if "attentions" in path]), len(inside)) == (722, 788)
    layers = tower.module.config.layers_per_block
    assert through_diffusers(names, 0, layers) == {path: path for path in names}
    other = {path: n for path, n in names.items() if "add_embedding" not in path}  # in this spelling diffusers does not know it
    assert through_diffusers(other, 1, layers) == {path: path for path in other}


def through_diffusers(names: dict[str, tuple[str, ...]], spelling: int, layers: int) -> dict[str, str]:
    """Site to the path that diffusers' converter makes of its name; the tensors' values say which is which."""
    order = list(names)
    state: dict[str, Tensor] = {}
    for i, path in enumerate(order):
        name = names[path][min(spelling, len(names[path]) - 1)]
        state |= {f"{name}.lora_down.weight": torch.tensor([[float(i)]]), f"{name}.lora_up.weight": torch.ones(1, 1)}
    state = converters._maybe_map_sgm_blocks_to_diffusers(state, SimpleNamespace(layers_per_block=layers))
    converted, _ = converters._convert_non_diffusers_lora_to_diffusers(state)
    back = {}
    for key, tensor in converted.items():
        if "down" in key.rsplit(".lora.", 1)[-1].rsplit("_lora.", 1)[-1]:
            module = key.removeprefix("unet.").rsplit(".lora.down", 1)[0].rsplit("_lora.down", 1)[0].replace(".processor", "")
            back[order[int(tensor)]] = module + (".0" if module.endswith("to_out") else "")
    return back


def test_no_two_weights_have_one_name() -> None:
    for base in ("sd15", "sd21", "sdxl", "flux_dev", "clip_l", "clip_bigg", "t5_xxl"):
        every = [name for place in places(tower_of(base)) for name in place.names]
        assert len(every) == len(set(every)) > 0, base


# FLUX: fused projections


def test_flux_is_split_as_diffusers_splits_it() -> None:
    """Every module of a file as sd-scripts write it, of FLUX.1's real widths in one block of each kind."""
    with torch.device("meta"):
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(**{**published.FLUX_DEV, "num_layers": 1, "num_single_layers": 1})
    (tower,) = towers_of(model)
    state: dict[str, Tensor] = {}
    found = places(tower)
    assert {s.name for place in found for s in place.sites} == offered(tower).keys()
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for place in found:
        d_out, d_in = sum(s.d_out for s in place.sites), place.sites[0].d_in
        pair = Pair(torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator), 0.5)
        pairs[place.names[0]] = place, pair
        if "final_layer" in place.names[0]:
            pair = pair._replace(scaling=1.0)  # diffusers drops the alpha of the last layer
            pairs[place.names[0]] = place, pair
        state |= {f"{place.names[0]}.lora_down.weight": pair.down, f"{place.names[0]}.lora_up.weight": pair.up}
        state[f"{place.names[0]}.alpha"] = torch.tensor(2 * pair.scaling)
    theirs = converters._convert_kohya_flux_lora_to_diffusers(dict(state))
    for name, (place, pair) in pairs.items():
        for site, part in split(SimpleNamespace(path="x"), name, place, pair):  # type: ignore[arg-type]
            key = site.name if f"{site.name}.lora_A.weight" in theirs else f"transformer.{site.name}"
            want = theirs[f"{key}.lora_B.weight"][:64] @ theirs[f"{key}.lora_A.weight"]
            torch.testing.assert_close(part.scaling * part.up[:64] @ part.down, want, msg=site.name)


SLICES = "transformer.single_transformer_blocks.0.attn.to_"


def test_fused_weights_are_the_slices_one_below_the_other(tmp_path: Path) -> None:
    """ΔW of `linear1` is q, k, v and the feed-forward's input in this order, zero where a slice is not adapted."""
    attachment = tuned("flux", [f"name:{SLICES}q", f"name:{SLICES}v"], rank=3, ranks={"attn.v": 5}, alphas={"attn.v": 4.0})
    state = load_file(kohya.save(attachment, tmp_path / "x"))
    name = "lora_unet_single_blocks_0_linear1"
    down, up, alpha = (state[f"{name}.{part}"].double() for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    want = deltas(attachment)
    zero = torch.zeros_like(want[f"{SLICES}q"])
    mlp = torch.zeros(len(up) - 3 * len(zero), zero.shape[1])
    assert state.keys() == {f"{name}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    fused = torch.cat([want[f"{SLICES}q"], zero, want[f"{SLICES}v"], mlp])
    torch.testing.assert_close(alpha / len(down) * up @ down, fused, rtol=1e-5, atol=1e-6)
    loaded = veneer.load(tiny_pipeline("flux"), tmp_path / "x")
    assert_same(deltas(loaded), want)
    assert {name: a.down.shape[0] for name, (_, a) in loaded.parts.items()} == {f"{SLICES}q": 3, f"{SLICES}v": 5}


def test_a_fused_pair_for_all_slices_stays_one(tmp_path: Path) -> None:
    """As sd-scripts train it: one `down` for q, k and v."""
    name = "lora_unet_double_blocks_0_txt_attn_qkv"
    state = {f"{name}.lora_down.weight": torch.randn(4, 32), f"{name}.lora_up.weight": torch.randn(96, 4)}
    save_file({**state, f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "x.safetensors")
    loaded = veneer.load(tiny_pipeline("flux"), tmp_path / "x")
    block = "transformer.transformer_blocks.0.attn.add_{}_proj"
    whole = 0.5 * state[f"{name}.lora_up.weight"].double() @ state[f"{name}.lora_down.weight"].double()
    assert_same(deltas(loaded), {block.format(x): rows for x, rows in zip("qkv", whole.chunk(3), strict=True)})
    again = load_file(kohya.save(loaded, tmp_path / "again"))
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_a_fused_pair_of_nothing_is_loaded(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{name}.lora_down.weight": torch.randn(4, 32), f"{name}.lora_up.weight": torch.zeros(96, 4)}
    save_file(state, tmp_path / "x.safetensors")
    assert len(veneer.load(tiny_pipeline("flux"), tmp_path / "x").parts) == 3


# alphas


def test_without_alpha_it_is_the_rank(files: Any, tmp_path: Path) -> None:
    path, _ = files("sd")
    save_file({k: t for k, t in load_file(path).items() if not k.endswith("alpha")}, tmp_path / "bare.safetensors")
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(tmp_path / "bare.safetensors")
    loaded = veneer.load(tiny_pipeline("sd"), tmp_path / "bare")
    assert_same(deltas(loaded), in_peft(plain))
    assert "no alpha for" in str(loaded.loaded)


def test_a_scale_of_zero_is_written_as_no_change(tmp_path: Path) -> None:
    attachment = tuned("sd", "attn.q", rank=2, alphas={"attn.q": 0.0})
    state = load_file(kohya.save(attachment, tmp_path / "x"))
    assert all(float(t) != 0 for k, t in state.items() if k.endswith("alpha"))
    assert not any(t.any() for k, t in state.items() if "lora_up" in k)


# other bases and spellings


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_both_spellings_are_read(files: Any, family: str, tmp_path: Path) -> None:
    path, want = files(family)
    other = {n: place.names[-1] for t in towers_of(tiny_pipeline(family)) for place in places(t) for n in place.names}
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
    assert_same(in_peft(plain), {f"unet.{k}": d for k, d in deltas(attachment).items()})
    for component, prefix in (("text_encoder", "lora_te_"), ("text_encoder_2", "lora_te2_")):
        tower = getattr(tiny_pipeline("sdxl"), component)
        path = kohya.save(fill(attach(tower, "lora", rank=2, where="attn")), tmp_path / component)
        assert all(k.startswith(prefix) for k in load_file(path))
        assert_same(deltas(veneer.load(getattr(tiny_pipeline("sdxl"), component), path)), deltas(veneer.attachments(tower)[0]))


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
    ("part", "word"),
    [
        ("dora_scale", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("oft_blocks", "OFT"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA"),
        ("diff", "full weights"),
        ("w_norm", "norms"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_other_changes_in_this_layout_are_refused(files: Any, tmp_path: Path, part: str, word: str, strict: bool) -> None:
    state = load_file(files("sd")[0])
    name = next(iter(state)).partition(".")[0]
    save_file({**state, f"{name}.{part}": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    pipe = tiny_pipeline("sd")
    with pytest.raises(LoadError, match=rf"'{name}\.{part}' is .*{word}.*nothing is loaded"):
        veneer.load(pipe, tmp_path / "x", strict=strict)
    assert veneer.attachments(pipe) == []


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {f"{Q}.lora_down.weight": torch.ones(2, 16), f"{Q}.lora_up.weight": torch.ones(16, 2), f"{Q}.alpha": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({f"{Q}.alpha": torch.tensor(0.0)}, r"to_q\.alpha' is 0, which sd-scripts"),
        ({f"{Q}.alpha": torch.ones(2)}, r"to_q\.alpha' has shape \(2,\)"),
        ({f"{Q}.alpha": torch.tensor(float("nan"))}, r"NaN or infinity in .*to_q\.alpha"),
        ({f"{Q}.lora_up.weight": None}, r"unused 2 of 2 tensors: .*no whole pairs"),
        ({f"{Q}.lora_up.weight": torch.ones(16, 3)}, r"unused 3 of 3 tensors"),
        ({f"{Q}.lora_down.weight": torch.ones(0, 16), f"{Q}.lora_up.weight": torch.ones(16, 0)}, r"unused 3 of 3"),
        ({f"{Q}.lora_down.weight": torch.tensor(1.0)}, r"unused 3 of 3"),
        ({f"{Q}.lora_down.weight": torch.ones(2, 17)}, r"misshapen 1: unet\..*to_q:down \(2, 17\) for \(2, 16\)"),
        ({f"{Q}.lora_mid.weight": torch.ones(2, 3, 3, 3)}, r"lora_mid\.weight' is \(2, 3, 3, 3\) between"),
        ({"lora_unet_elsewhere.lora_down.weight": torch.ones(2, 2)}, r"unused 1 of 4 tensors: lora_unet_elsewhere"),
        ({"bundle_emb.toy": torch.ones(2)}, r"unused 1 of 4 tensors: bundle_emb"),
    ],
    ids=["alpha-0", "alphas", "alpha-nan", "half", "ranks", "rank-0", "scalar", "width", "mid", "elsewhere", "other"],
)
def test_files_that_are_not_whole(tmp_path: Path, changed: dict[str, Tensor | None], message: str) -> None:
    save_file({k: t for k, t in {**GOOD, **changed}.items() if t is not None}, tmp_path / "x.safetensors")
    pipe = tiny_pipeline("sd")
    with pytest.raises(LoadError, match=message):
        veneer.load(pipe, tmp_path / "x")
    assert veneer.attachments(pipe) == []


def test_not_strict_loads_what_fits_and_says_what_did_not(tmp_path: Path) -> None:
    save_file({**GOOD, "lora_unet_elsewhere.lora_down.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    report = veneer.load(tiny_pipeline("sd"), tmp_path / "x", strict=False).loaded
    assert (len(report.used), report.unused) == (2, ("lora_unet_elsewhere.lora_down.weight",))


def test_another_base_is_named(files: Any) -> None:
    with pytest.raises(LoadError, match=r"unused \d+ of \d+ tensors: .*made for"):
        veneer.load(tiny_pipeline("flux"), files("sd")[0])
    with pytest.raises(LoadError, match=r"misshapen \d+: unet\."):
        veneer.load(tiny_pipeline("sd", block_out_channels=(16, 48)), files("sd")[0])
    wide = tiny_pipeline("flux", num_attention_heads=4)
    with pytest.raises(LoadError, match=r"misshapen: lora_unet_double_blocks_0_img_attn_qkv is up \(96, "):
        veneer.load(wide, files("flux")[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [], "no attachment"),
        (lambda: attach(tiny_pipeline("sd"), "bitfit"), r"'bitfit' is bitfit; kohya's LoRA files hold lora.*native"),
        (lambda: attach(tiny_pipeline("sd"), "lora", train="norm"), r"has trained unet\..*no place.*native"),
        (lambda: attach(tiny_pipeline("sd"), "lora", where="text/embed.token"), r"token_embedding' is an embedding"),
        (lambda: attach(tiny_pipeline("pixart"), "lora"), r"part of a PixArtTransformer2DModel, which the layout has no names"),
        (lambda: attach(tiny_pipeline("sd3"), "lora"), r"part of a SD3Transformer2DModel, which the layout has no names"),
        (lambda: attach(net(), "lora", where="head"), r"'head' is part of a Net"),
        (lambda: whole(), r"to_qkv' is a fused projection.*slices"),
    ],
    ids=["nothing", "method", "trained", "embedding", "pixart", "sd3", "toy", "whole"],
)
def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path, make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SaveError, match=message):
        kohya.save(make(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def whole() -> veneer.Attachment:
    pipe = tiny_pipeline("sd")
    pipe.fuse_qkv_projections()
    return attach(pipe, "lora", where="attn.qkv", rank=2)


def test_one_weight_adapted_twice_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    both = [attach(pipe, "lora", where="attn.q", rank=2) for _ in range(2)]
    with pytest.raises(SaveError, match=r"two attachments adapt 'lora_unet_down"):
        kohya.save(both, tmp_path / "x")
