"""LoRA for diffusers and peft: they load it without veneer, with equal weight updates."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.formats import low_rank
from tests.formats.cases import deltas, fill, header, rewrite
from tests.formats.low_rank import expected, in_peft
from tests.injection.toy import net
from tests.raising import raises
from veneer.formats import diffusers as lora_format
from veneer.formats import inspect, load_all
from veneer.injection import LoadError, SaveError, attach
from veneer.testing.pipelines import tiny_pipeline

peft = pytest.importorskip("peft", reason="diffusers loads LoRA through peft")

PROMPT = "a photo of a duck on the beach"
WHERE: dict[str, list[str]] = {
    "sd": ["attn", "xattn", "mlp", "conv", "name:unet.conv_in", "name:unet.conv_out", "text/attn", "text/mlp"],
    "sdxl": ["attn.{q,v}", "xattn.k", "name:unet.conv_in", "text/attn", "text_2/attn.out", "text_2/proj.out"],
    "sd3": ["attn", "mlp", "text/attn", "text_2/attn.k", "text_2/mlp"],
    "flux": ["attn", "mlp", "single", "text/attn"],
    "pixart": ["attn", "xattn", "mlp"],
    "dit": ["attn", "mlp"],
}


def tuned(family: str, pipe: Any = None) -> veneer.Attachment:
    return low_rank.tuned(family, WHERE[family], pipe)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The file of a family, and ΔW of every site in it."""
    made: dict[str, tuple[Path, dict[str, Tensor]]] = {}

    def get(family: str) -> tuple[Path, dict[str, Tensor]]:
        if family not in made:
            attachment = tuned(family)
            made[family] = lora_format.save(attachment, tmp_path_factory.mktemp(family)), expected(attachment)
        return made[family]

    return get


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, delta in want.items():
        assert delta.abs().max() > 1e-2, name
        torch.testing.assert_close(got[name], delta, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def picture(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(PROMPT, num_inference_steps=2, guidance_scale=4.0, generator=generator, output_type="pt").images


def inject(pipe: Any, path: Path) -> None:
    """Steps of diffusers, for classes without a loader."""
    config = peft.LoraConfig(
        **{
            k.removeprefix("transformer."): v
            for k, v in json.loads(header(path)["__metadata__"]["lora_adapter_metadata"]).items()
        }
    )
    state = {k.removeprefix("transformer."): t for k, t in load_file(path).items()}
    peft.inject_adapter_in_model(config, pipe.transformer, state_dict=state)
    result = peft.set_peft_model_state_dict(pipe.transformer, state)
    assert not result.unexpected_keys


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_diffusers_alone_generates_the_same_images(files: Any, family: str) -> None:
    """`load_lora_weights` on a pipeline that veneer has never seen: pixels in 0 to 1, float32."""
    pipe = tiny_pipeline(family)
    bare = picture(pipe)
    tuned(family, pipe)
    with_veneer = picture(pipe)
    plain = tiny_pipeline(family)
    plain.load_lora_weights(files(family)[0])
    assert (picture(plain) - with_veneer).abs().max() <= 1e-4
    assert (bare - with_veneer).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_diffusers_makes_the_same_change_of_every_weight(files: Any, family: str) -> None:
    path, want = files(family)
    pipe = tiny_pipeline(family)
    pipe.load_lora_weights(path)
    assert_same(in_peft({k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}), want)


@pytest.mark.parametrize("family", ["pixart", "dit"])
def test_peft_makes_the_same_change_where_diffusers_has_no_loader(files: Any, family: str) -> None:
    path, want = files(family)
    pipe = tiny_pipeline(family)
    inject(pipe, path)
    assert_same(in_peft({"transformer": pipe.transformer}), want)


@pytest.mark.parametrize("family", list(WHERE))
def test_read_back_it_is_the_same_change(files: Any, family: str) -> None:
    path, want = files(family)
    loaded = veneer.load(tiny_pipeline(family), path)
    assert_same(deltas(loaded), want)
    assert loaded.loaded.clean
    assert loaded.loaded.notes == ()


def test_reading_back_and_writing_again_keeps_every_tensor(files: Any, tmp_path: Path) -> None:
    path, want = files("sd")
    again = lora_format.save(veneer.load(tiny_pipeline("sd"), path), tmp_path / "again")
    first, second = load_file(path), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[k]) for k, t in first.items())
    assert_same(deltas(veneer.load(tiny_pipeline("sd"), again)), want)


def test_text_model_is_written_and_may_be_missing(files: Any, tmp_path: Path) -> None:
    """Old and new transformers name CLIP's layers differently; a file of either kind fits."""
    path, want = files("sd")
    keys = [k for k in header(path) if k.startswith("text_encoder")]
    assert all(k.startswith("text_encoder.text_model.encoder.layers.") for k in keys)
    changed = rewrite(path, lambda h: {k.replace(".text_model.", "."): v for k, v in h.items()}, tmp_path / "new.safetensors")
    assert_same(deltas(veneer.load(tiny_pipeline("sd"), changed)), want)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_itself_has_saved(tmp_path: Path, rslora: bool) -> None:
    """`save_lora_adapter`: no component in the names, peft's own config in the header, a separate rank for one module."""
    pipe = tiny_pipeline("sd")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_v"], use_rslora=rslora, init_lora_weights=False,
        rank_pattern={} if rslora else {"attn1.to_v": 2}, alpha_pattern={} if rslora else {"attn2.to_q": 3},
    )  # fmt: skip
    pipe.unet.add_adapter(config)
    want = in_peft({"unet": pipe.unet})
    pipe.unet.save_lora_adapter(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    loaded = veneer.load(tiny_pipeline("sd"), path)
    assert_same(deltas(loaded), want)
    bare = veneer.load(tiny_pipeline("sd").unet, path)
    assert_same({f"unet.{k}": d for k, d in deltas(bare).items()}, want)


def test_a_file_without_alpha_has_scale_one_as_in_diffusers(files: Any, tmp_path: Path) -> None:
    path, _ = files("sd")
    save_file(load_file(path), tmp_path / "bare.safetensors")
    loaded = veneer.load(tiny_pipeline("sd"), tmp_path / "bare")
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(tmp_path / "bare.safetensors")
    assert_same(deltas(loaded), in_peft({"unet": plain.unet, "text_encoder": plain.text_encoder}))
    assert "no alpha" in str(loaded.loaded)


def test_alpha_zero_is_no_change(tmp_path: Path) -> None:
    attachment = fill(attach(tiny_pipeline("sd"), "lora", where="attn.q", rank=2))
    path = lora_format.save(attachment, tmp_path / "toy")
    text = json.loads(header(path)["__metadata__"]["lora_adapter_metadata"]) | {"unet.lora_alpha": 0}

    def change(found: dict[str, Any]) -> None:
        found["__metadata__"]["lora_adapter_metadata"] = json.dumps(text)

    loaded = veneer.load(tiny_pipeline("sd"), rewrite(path, change))
    assert all(not adapter.weight(torch.zeros(site.weight_shape)).any() for site, adapter in loaded.parts.values())


def test_several_attachments_make_one_file(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    both = [fill(attach(pipe, "lora", where=w, rank=r)) for w, r in (("attn", 4), ("text/attn", 2))]
    path = lora_format.save(both, tmp_path)
    assert path.name == "pytorch_lora_weights.safetensors"
    assert_same(deltas(veneer.load(tiny_pipeline("sd"), path)), deltas(*both))


def test_a_bare_unet_is_written_as_the_pipelines(tmp_path: Path) -> None:
    attachment = fill(attach(tiny_pipeline("sd").unet, "lora", rank=2))
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(lora_format.save(attachment, tmp_path / "toy"))
    assert_same(in_peft({"unet": plain.unet}), {f"unet.{k}": d for k, d in deltas(attachment).items()})


def test_rows_of_a_fused_projection_are_written_under_the_layers_they_were(tmp_path: Path) -> None:
    """An unfused pipeline takes the slices; the fused layer as a whole has no name there."""
    fused = tiny_pipeline("sd")
    fused.fuse_qkv_projections()
    attachment = fill(attach(fused, "lora", where="attn.{q,v}", rank=2))
    assert any(site.rows for site, _ in attachment.parts.values())
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(lora_format.save(attachment, tmp_path / "toy"))
    assert_same(in_peft({"unet": plain.unet}), deltas(attachment))
    attachment.detach()
    whole = attach(fused, "lora", where="attn.qkv", rank=2)
    with raises(SaveError, where=next(iter(whole.parts)), given="fused"):
        lora_format.save(whole, tmp_path / "whole")
    assert not (tmp_path / "whole.safetensors").exists()


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: [], {"given": 0, "expected": 1}),
        (lambda: attach(tiny_pipeline("sd"), "bitfit"), {"where": "bitfit", "given": "bitfit", "expected": "lora"}),
        (lambda: attach(tiny_pipeline("sd"), "lora", train="norm"), {"where": "lora", "expected": ()}),
        (lambda: attach(tiny_pipeline("sd"), "lora", where="text/embed.token"), {"given": "embedding"}),
        (lambda: attach(tiny_pipeline("flux"), "lora", where="text_2/attn"), {"given": "T5EncoderModel"}),
        (lambda: attach(tiny_pipeline("sd"), "lora", where="text/mlp"), {"where": "text_encoder", "expected": "attn"}),
        (lambda: attach(net(), "lora", where="head"), {"where": "head", "given": "Net"}),
    ],
    ids=["nothing", "method", "trained", "embedding", "t5", "mlp", "toy"],
)
def test_what_the_format_cannot_hold_is_rejected(tmp_path: Path, make: Any, data: dict[str, Any]) -> None:
    with raises(SaveError, **data):
        lora_format.save(make(), tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_one_weight_adapted_twice_is_rejected(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    both = [attach(pipe, "lora", where="attn.q", rank=2) for _ in range(2)]
    with raises(SaveError, where=next(iter(both[0].parts)), given=2, expected=1):
        lora_format.save(both, tmp_path / "toy")


def test_another_base_is_named(files: Any) -> None:
    """An SD file on SD3: no key fits. On an SD of other widths: shapes are named."""
    with pytest.raises(LoadError) as caught:
        veneer.load(tiny_pipeline("sd3"), files("sd")[0])
    assert set(caught.value.unused) == {key for key in load_file(files("sd")[0]) if key.startswith("unet.")}
    wide = tiny_pipeline("sd", block_out_channels=(16, 48))
    with pytest.raises(LoadError) as caught:
        veneer.load(wide, files("sd")[0])
    assert caught.value.misshapen
    assert all(key.startswith("unet.") for key in caught.value.misshapen)
    assert veneer.attachments(wide) == []


# DoRA, and what other tools write in this layout


def merged(pipe: Any) -> dict[str, dict[str, Tensor]]:
    """Weights of every part, with attachments merged."""
    return {
        c: {k: t.clone() for k, t in m.state_dict().items()} for c, m in pipe.components.items() if isinstance(m, torch.nn.Module)
    }


def by_veneer(path: Path, family: str) -> dict[str, dict[str, Tensor]]:
    pipe = tiny_pipeline(family)
    for attachment in load_all(pipe, path):
        attachment.merge()
    found = {}
    for attachment in veneer.attachments(pipe):
        found |= {c: dict(attachment.host_state_dict(c)) for c in attachment.towers}
    return found


def by_diffusers(path: Path, family: str) -> dict[str, dict[str, Tensor]]:
    pipe = tiny_pipeline(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(path)
        pipe.fuse_lora(components=[c for c in pipe._lora_loadable_modules if c != "text_encoder_2"])
        pipe.unload_lora_weights()
    return merged(pipe)


def assert_weights(got: dict[str, dict[str, Tensor]], want: dict[str, dict[str, Tensor]], family: str) -> None:
    base = merged(tiny_pipeline(family))
    for component, weights in got.items():
        assert any((weights[k] - t).abs().max() > 1e-3 for k, t in base[component].items()), component
        for name, weight in weights.items():
            torch.testing.assert_close(weight, want[component][name], rtol=1e-4, atol=1e-5, msg=f"{component}.{name}")


DORA: dict[str, list[str]] = {"sd": ["attn", "xattn.v", "conv.res", "text/attn"], "flux": ["attn", "mlp", "text/attn.q"]}


@pytest.mark.parametrize("family", DORA)
def test_dora_is_the_same_in_diffusers(tmp_path: Path, family: str) -> None:
    tuned = fill(
        attach(tiny_pipeline(family), "dora", where=DORA[family], rank=3, alpha=2.0, by_site={"attn.v": {"rank": 2}}), std=0.2
    )
    path = lora_format.save(tuned, tmp_path / "x")
    assert any("lora_magnitude_vector" in key for key in load_file(path))
    tuned.merge()
    want = {c: dict(tuned.host_state_dict(c)) for c in tuned.towers}
    assert_weights(want, by_diffusers(path, family), family)
    assert_weights(by_veneer(path, family), want, family)


def test_dora_that_diffusers_itself_has_saved(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv1"], use_dora=True))
        for name, p in pipe.unet.named_parameters():
            if "lora_" in name:
                p.data += 0.2 * torch.randn_like(p)
        pipe.unet.save_lora_adapter(tmp_path)
        pipe.unet.fuse_lora()
        pipe.unet.unload_lora()
    got = by_veneer(tmp_path / "pytorch_lora_weights.safetensors", "sd")["unet"]
    after = pipe.unet.state_dict()
    assert all(torch.allclose(weight, after[name], rtol=1e-4, atol=1e-5) for name, weight in got.items())
    assert sum(not torch.equal(t, got[k]) for k, t in tiny_pipeline("sd").unet.state_dict().items()) > 10


def test_lora_and_dora_in_one_model_are_rejected(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    both = [attach(pipe, "lora", where="attn.q", rank=2), attach(pipe, "dora", where="attn.v", rank=2)]
    with raises(SaveError, where="unet", given=("lora", "dora")):
        lora_format.save(both, tmp_path / "x")


@pytest.mark.parametrize("full", [False, True])
def test_lokr_in_this_layout(tmp_path: Path, full: bool) -> None:
    """As ai-toolkit writes it, with each module's alpha: C ⊗ D, times alpha / rank where D is of low rank."""
    name, generator = "transformer.single_transformer_blocks.0.attn.to_q", torch.Generator().manual_seed(0)
    left = torch.randn(4, 4, generator=generator)
    up, down = torch.randn(8, 2, generator=generator), torch.randn(2, 8, generator=generator)
    state = {f"{name}.lokr_w1": left, f"{name}.alpha": torch.tensor(3.0)}
    state |= {f"{name}.lokr_w2": up @ down} if full else {f"{name}.lokr_w2_a": up, f"{name}.lokr_w2_b": down}
    save_file(state, tmp_path / "x.safetensors")
    pipe = tiny_pipeline("flux")
    before = pipe.transformer.get_submodule(name.partition(".")[2]).weight.detach().clone()
    loaded = veneer.load(pipe, tmp_path / "x")
    assert loaded.method.name == "lokr"
    loaded.merge()
    after = pipe.transformer.get_submodule(name.partition(".")[2]).weight
    torch.testing.assert_close(after - before, torch.kron(left, up @ down) * (1.0 if full else 1.5), rtol=1e-4, atol=1e-5)


def test_a_dora_scale_beside_a_pair(tmp_path: Path) -> None:
    """OneTrainer's and LyCORIS' magnitudes under diffusers' paths: per output or per input, by their shape."""
    name, generator = "transformer.single_transformer_blocks.0.proj_mlp", torch.Generator().manual_seed(0)
    base = tiny_pipeline("flux").transformer.get_submodule(name.partition(".")[2]).weight.detach().clone()
    out, width = base.shape
    down, up = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
    after = base + 1.5 * up @ down
    for dim, shape in ((1, (out, 1)), (0, (1, width))):
        m = torch.rand(shape, generator=generator) + 0.5
        state = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(3.0)}
        save_file({**state, f"{name}.dora_scale": m}, tmp_path / "x.safetensors")
        pipe = tiny_pipeline("flux")
        loaded = veneer.load(pipe, tmp_path / "x")
        assert loaded.method.name == "dora"
        loaded.merge()
        got = pipe.transformer.get_submodule(name.partition(".")[2]).weight
        torch.testing.assert_close(got, m * after / after.norm(dim=dim, keepdim=True), rtol=1e-5, atol=1e-5)


def test_alphas_of_single_modules(tmp_path: Path) -> None:
    """`….alpha` beside the pair takes precedence over the rank; diffusers does the same."""
    attachment = low_rank.tuned("flux", ["attn.q", "text/attn.q"], rank=2)
    state = load_file(lora_format.save(attachment, tmp_path / "x"))
    names = {key.partition(".lora_")[0] for key in state}
    save_file(state | {f"{name}.alpha": torch.tensor(3.0) for name in names}, tmp_path / "y.safetensors")
    plain = tiny_pipeline("flux")
    plain.load_lora_weights(tmp_path / "y.safetensors")
    loaded = veneer.load(tiny_pipeline("flux"), tmp_path / "y")
    assert_same(deltas(loaded), in_peft(plain.components))
    assert_same(deltas(loaded), {name: 1.5 * delta for name, delta in deltas(attachment).items()})


@pytest.mark.parametrize("text", ["{}", '{"text_encoder.r": 2}', "null"])
def test_metadata_without_an_entry_of_the_component(tmp_path: Path, text: str) -> None:
    """diffusers rejects it, and reads alpha = r only where there is no metadata at all; so does veneer."""
    attachment = low_rank.tuned("flux", ["attn.q"], rank=2)
    state, path = load_file(lora_format.save(attachment, tmp_path / "x")), tmp_path / "y.safetensors"
    save_file(state, path, {"lora_adapter_metadata": text})
    plain, pipe = tiny_pipeline("flux"), tiny_pipeline("flux")
    if text == "null":
        plain.load_lora_weights(path)
        assert_same(deltas(veneer.load(pipe, path)), in_peft(plain.components))
        return
    with pytest.raises(KeyError):
        plain.load_lora_weights(path)
    with raises(LoadError, missing=("alpha",)) as caught:
        veneer.load(pipe, path)
    assert caught.value.where.endswith("attn.to_q")
    assert {alpha for block in inspect(path).blocks for alpha in block.alphas} <= {None}
    save_file(
        state | {f"{k.partition('.lora_')[0]}.alpha": torch.tensor(3.0) for k in state}, path, {"lora_adapter_metadata": text}
    )
    assert_same(deltas(veneer.load(pipe, path)), {name: 1.5 * delta for name, delta in deltas(attachment).items()})


def test_inspection_of_magnitudes_and_alphas_of_single_modules(tmp_path: Path) -> None:
    name = "single_transformer_blocks.0.proj_mlp"
    out, width = tiny_pipeline("flux").transformer.get_submodule(name).weight.shape
    state = {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(out, 2)}
    save_file(
        {**state, f"{name}.alpha": torch.tensor(3.0), f"{name}.dora_scale": torch.ones(1, width)}, tmp_path / "x.safetensors"
    )
    (block,) = inspect(tmp_path / "x").blocks
    assert (inspect(tmp_path / "x").format, block.method, set(block.alphas)) == ("diffusers", "dora", {3.0})
    assert veneer.load(tiny_pipeline("flux"), tmp_path / "x").method.name == "dora"


def test_an_initialization_that_changed_the_base_is_rejected(tmp_path: Path) -> None:
    path = lora_format.save(fill(attach(tiny_pipeline("sd"), "lora", where="attn.q", rank=2)), tmp_path / "x")
    text = json.loads(header(path)["__metadata__"]["lora_adapter_metadata"]) | {"unet.init_lora_weights": "pissa"}

    def change(found: dict[str, Any]) -> None:
        found["__metadata__"]["lora_adapter_metadata"] = json.dumps(text)

    with raises(LoadError, option="init_lora_weights", given="pissa"):
        veneer.load(tiny_pipeline("sd"), rewrite(path, change))
