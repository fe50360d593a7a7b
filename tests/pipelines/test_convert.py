"""`veneer convert`: the same ΔW of every weight, or no file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from veneer.pipelines.convert import ConvertConfig, convert

import veneer
from tests.formats.cases import deltas, fill, header
from tests.formats.test_cloneofsimo import made
from tests.raising import raises
from veneer import base_models, formats
from veneer.cli import main
from veneer.formats import lycoris, native
from veneer.formats._core import lora_writer
from veneer.injection import LoadError, SaveError, attach
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline

WHERE = ["attn", "xattn.k", "conv", "text/attn"]
FORMS = ("kohya", "diffusers", "native")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_pipeline("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """One adapter in every format, and its change of each weight."""
    folder = tmp_path_factory.mktemp("files")
    lora = fill(attach(tiny_pipeline("sd"), "lora", where=WHERE, rank=2, alpha=3.0, by_site={"conv.res": {"rank": 4}}))
    return {form: formats.formats.get(form)().save(lora, folder / form) for form in FORMS}, deltas(lora)


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("form", FORMS)
def test_from_every_format_to_every_other(files: Any, base: Path, tmp_path: Path, form: str, to: str) -> None:
    paths, want = files
    lines = convert(ConvertConfig(paths[form], to, str(base), tmp_path / "out"))  # type: ignore[arg-type]
    assert lines[0] == str(tmp_path / "out.safetensors")
    assert lines[1].startswith(f"{len(want)} weight updates are equal")
    pipe = tiny_pipeline("sd")
    got = deltas(veneer.load(pipe, tmp_path / "out"))
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[name], delta, rtol=1e-5, atol=1e-7) for name, delta in want.items())
    assert list(tmp_path.iterdir()) == [tmp_path / "out.safetensors"]


def test_the_base_model_of_a_native_file_is_known(base: Path, tmp_path: Path) -> None:
    lora = fill(attach(tiny_pipeline("sd"), "lora", rank=2))
    path = native.save(lora, tmp_path / "a", {"base": str(base)})
    assert convert(ConvertConfig(path, "kohya"))[0] == str(tmp_path / "a-kohya.safetensors")
    convert(ConvertConfig(tmp_path / "a-kohya.safetensors", "native", str(base), tmp_path / "b"))
    assert convert(ConvertConfig(tmp_path / "b", "diffusers"))[0] == str(tmp_path / "b-diffusers.safetensors")


def test_each_token_goes_into_a_file_beside(base: Path, tmp_path: Path) -> None:
    want = made(tmp_path / "old.safetensors", tiny_pipeline("sd"), ["Attention", "GEGLU"], tokens=2)
    lines = convert(ConvertConfig(tmp_path / "old.safetensors", "kohya", str(base), tmp_path / "new"))
    assert lines[:3] == [str(tmp_path / f"{name}.safetensors") for name in ("new", "s0", "s1")]
    old = load_file(tmp_path / "old.safetensors")
    for name in ("s0", "s1"):
        assert {k: t.flatten().tolist() for k, t in load_file(tmp_path / f"{name}.safetensors").items()} == {
            f"<{name}>": old[f"<{name}>"].tolist()
        }
    got = deltas(veneer.load(tiny_pipeline("sd"), tmp_path / "new"))
    assert all(torch.allclose(got[name], delta, rtol=1e-6, atol=1e-9) for name, delta in want.items())


def test_token_embeddings_stay_in_a_native_file(base: Path, tmp_path: Path) -> None:
    made(tmp_path / "old.safetensors", tiny_pipeline("sd"), ["Attention", "GEGLU"], tokens=2)
    convert(ConvertConfig(tmp_path / "old.safetensors", "native", str(base), tmp_path / "new"))
    assert [a.method.name for a in formats.load_all(tiny_pipeline("sd"), tmp_path / "new")] == ["textual_inversion", "lora"]


METHODS: dict[str, dict[str, Any]] = {
    "dora": {"rank": 2, "alpha": 3.0}, "loha": {"rank": 2}, "lokr": {"factor": 4}, "oft": {"side": "output"},
    "boft": {"side": "output", "b": 4}, "glora": {"product": "matrices", "rank": 2}, "ia3": {},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_compared_by_its_effect_on_the_base_model(base: Path, tmp_path: Path, method: str) -> None:
    where = ["attn.{q,v}", "conv.res"]
    path = fill(attach(tiny_pipeline("sd"), method, where=where, **METHODS[method])).save(tmp_path / "a")
    lines = convert(ConvertConfig(path, "lycoris", str(base)))
    assert int(lines[1].split()[0]) > 20
    lines = convert(ConvertConfig(tmp_path / "a-lycoris.safetensors", "native", str(base), tmp_path / "b"))
    assert float(lines[1].split("largest difference ")[1].split()[0]) < 1e-5
    assert [a.method.name for a in formats.load_all(tiny_pipeline("sd"), tmp_path / "b")] == [method]


@pytest.mark.parametrize("slip", [1.001, 0.0])
def test_a_conversion_with_another_effect_is_deleted_if_it_depends_on_the_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slip: float
) -> None:
    """A writer with wrong magnitudes of DoRA, which differ in nothing else."""
    path = fill(attach(tiny_pipeline("sd"), "dora", where="conv.io", rank=2)).save(tmp_path / "a")
    write = lycoris.BY_METHOD["dora"].write
    monkeypatch.setattr(
        type(lycoris.BY_METHOD["dora"]), "write", lambda _, group: (t := write(group)) | {"dora_scale": t["dora_scale"] * slip}
    )
    with raises(SaveError, file=tmp_path / "out.safetensors") as caught:
        convert(ConvertConfig(path, "lycoris", str(base), tmp_path / "out"))
    assert caught.value.where.startswith("unet.conv_")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(files: Any, base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {k: t.to(dtype) if t.ndim else t for k, t in load_file(files[0]["kohya"]).items()}
    save_file(state, tmp_path / "half.safetensors")
    convert(ConvertConfig(tmp_path / "half.safetensors", "diffusers", str(base), tmp_path / "out"))
    assert {t.dtype for t in load_file(tmp_path / "out.safetensors").values()} == {dtype}


def test_unsupported_parts_are_listed(files: Any, base: Path, tmp_path: Path) -> None:
    lines = convert(ConvertConfig(files[0]["kohya"], "diffusers", str(base), tmp_path / "out"))
    count = len([key for key in header(files[0]["kohya"])["__metadata__"] if key != "format"])
    assert any(line.startswith(f"not copied: {count} metadata entries (ss_") for line in lines)


# what is refused


def test_methods_that_the_format_has_no_place_for(base: Path, tmp_path: Path) -> None:
    path = fill(attach(tiny_pipeline("sd"), "bitfit")).save(tmp_path / "a")
    with raises(SaveError, given="bitfit", expected="lora"):
        convert(ConvertConfig(path, "kohya", str(base), tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("slip", [1.001, -1.0, 0.0])
def test_a_conversion_with_another_effect_is_deleted(
    files: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slip: float
) -> None:
    """A writer with a wrong scale of one weight."""
    true = lora_writer.merge_adapters

    def wrong(place: Any, adapters: Any) -> Any:
        factors = true(place, adapters)
        return factors._replace(up=factors.up * slip) if "conv_in" in place.names[0] else factors

    monkeypatch.setattr(lora_writer, "merge_adapters", wrong)
    with raises(SaveError, where="unet.conv_in"):
        convert(ConvertConfig(files[0]["native"], "kohya", str(base), tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_as_before(files: Any, tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    formats.convert(pipe, files[0]["diffusers"], "kohya", tmp_path / "out")
    assert veneer.attachments(pipe) == []
    with raises(SaveError, file=tmp_path / "out.safetensors", given="exists"):
        formats.convert(pipe, files[0]["diffusers"], "kohya", tmp_path / "out")
    with raises(LoadError, file=files[0]["diffusers"]):
        formats.convert(tiny_pipeline("dit"), files[0]["diffusers"], "kohya", tmp_path / "other")
    assert veneer.attachments(pipe) == []


def test_what_must_be_said(files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with raises(OptionError, option="to", method="convert"):
        convert(ConvertConfig(files[0]["kohya"]))
    assert main(["convert", str(files[0]["kohya"]), "--to", "diffusers", "--out", str(tmp_path / "x")]) == 1
    assert "--base" in capsys.readouterr().err


def test_the_command(files: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(files[0]["native"]), "--to", "kohya", "--base", str(base), "--out", str(tmp_path / "x")]
    assert main(words) == 0
    assert "weight updates are equal" in capsys.readouterr().out
    assert (tmp_path / "x.safetensors").is_file()


XL = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": (640, 640),
    "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k": (1280, 2048),
    "text_encoder_2.text_model.encoder.layers.31.self_attn.v_proj": (1280, 1280),
}
FLUX = {
    "transformer.transformer_blocks.18.attn.to_q": (3072, 3072),
    "transformer.single_transformer_blocks.37.proj_mlp": (12288, 3072),
}
SD3 = {
    "transformer.transformer_blocks.0.attn.to_q": (1536, 1536), "transformer.transformer_blocks.23.attn.add_k_proj": (1536, 1536),
}  # fmt: skip
FLUX2 = {
    "transformer.transformer_blocks.4.attn.to_k": (3072, 3072),
    "transformer.single_transformer_blocks.19.attn.to_qkv_mlp_proj": (27648, 3072),
}
Z_IMAGE = {"transformer.layers.29.attention.to_v": (3840, 3840), "transformer.noise_refiner.1.feed_forward.w2": (3840, 10240)}
LUMINA = {"transformer.layers.25.attn.to_q": (2304, 2304), "transformer.layers.25.attn.to_v": (768, 2304)}
WAN = {"transformer.blocks.29.attn2.to_out.0": (1536, 1536), "transformer.blocks.0.ffn.net.2": (1536, 8960)}
PUBLISHED = {
    "sdxl": XL, "flux": FLUX, "sd35": SD3, "flux2-klein-4b": FLUX2, "z-image": Z_IMAGE, "lumina2": LUMINA, "wan-1.3b": WAN,
}  # fmt: skip


def published(family: str, folder: Path, rank: int = 3) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA in the layout of diffusers, at the names and shapes of a published model, and ΔW by diffusers' module names."""
    generator = torch.Generator().manual_seed(0)
    tensors, changes = {}, {}
    for name, (rows, width) in PUBLISHED[family].items():
        down, up = torch.randn(rank, width, generator=generator), torch.randn(rows, rank, generator=generator)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        changes[name] = up @ down
    path = folder / f"{family}.safetensors"
    save_file(tensors, path)
    return path, changes


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_file_of_a_published_model_needs_no_base_model(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, changes = published(family, tmp_path)
    assert formats.architecture_of(path) == family
    for file, to in ((path, "kohya"), (tmp_path / "kohya", "comfyui"), (tmp_path / "comfyui", "diffusers")):
        assert main(["convert", str(file), "--to", to, "--out", str(tmp_path / to)]) == 0, capsys.readouterr().err
    back = load_file(tmp_path / "diffusers.safetensors")
    pairs = {key.removesuffix(".lora_A.weight"): key for key in back if key.endswith("lora_A.weight")}
    assert pairs.keys() == changes.keys()
    for name, key in pairs.items():
        assert torch.allclose(back[key.replace("lora_A", "lora_B")] @ back[key], changes[name], rtol=1e-5, atol=1e-5)
    assert "base" not in header(tmp_path / "kohya.safetensors").get("__metadata__", {})


def test_a_native_file_of_an_architecture_loads_on_the_base_model(tmp_path: Path) -> None:
    """Whatever else its config says, such as another sample size."""
    path, changes = published("sdxl", tmp_path)
    assert main(["convert", str(path), "--to", "native", "--out", str(tmp_path / "native")]) == 0
    parts = base_models.ARCHITECTURES["sdxl"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{**parts["unet"][1], "sample_size": 96})
        text = CLIPTextModelWithProjection(CLIPTextConfig(**{**parts["text_encoder_2"][1], "bos_token_id": 7}))
    loaded = veneer.load(SimpleNamespace(components={"unet": unet, "text_encoder_2": text}), tmp_path / "native")
    assert {name: tuple(delta.shape) for name, delta in deltas(loaded).items()} == {n: tuple(c.shape) for n, c in changes.items()}


def test_a_file_of_several_families_needs_a_base_model(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 1152), f"{name}.lora_B.weight": torch.ones(1152, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    with raises(OptionError, option="base", file=tmp_path / "a.safetensors"):
        convert(ConvertConfig(tmp_path / "a.safetensors", "native"))


@pytest.mark.parametrize(("block", "rows", "family"), [(0, 9216, "sd3"), (0, 13824, "sd35"), (20, 9216, "sd35")])
def test_modulation_layers_tell_sd3_from_sd35(block: int, rows: int, family: str, tmp_path: Path) -> None:
    names = {"attn.to_q": 1536, "norm1.linear": rows}
    tensors = {}
    for name, width in names.items():
        start = f"transformer.transformer_blocks.{block}.{name}"
        tensors |= {f"{start}.lora_A.weight": torch.ones(2, 1536), f"{start}.lora_B.weight": torch.ones(width, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert formats.architecture_of(tmp_path / "a.safetensors") == family
    assert main(["convert", str(tmp_path / "a.safetensors"), "--to", "kohya", "--out", str(tmp_path / "b")]) == 0


def test_merge_and_resize_need_no_base_model(tmp_path: Path) -> None:
    path, changes = published("sdxl", tmp_path)
    assert main(["merge", str(path), str(path), "--weights", "1", "0.5", "--out", str(tmp_path / "sum")]) == 0
    assert main(["resize", str(path), "--rank", "2", "--out", str(tmp_path / "small")]) == 0
    total, small = load_file(tmp_path / "sum.safetensors"), load_file(tmp_path / "small.safetensors")
    for name, change in changes.items():
        summed, resized = (t[f"{name}.lora_B.weight"] @ t[f"{name}.lora_A.weight"] for t in (total, small))
        assert torch.allclose(summed, 1.5 * change, rtol=1e-4, atol=1e-4)
        u, s, vh = torch.linalg.svd(change)
        assert torch.allclose(resized, u[:, :2] * s[:2] @ vh[:2], rtol=1e-3, atol=1e-3)


def test_methods_that_need_the_weight_need_a_base_model(tmp_path: Path) -> None:
    path, changes = published("sdxl", tmp_path)
    tensors = load_file(path)
    for name, change in changes.items():
        tensors[f"{name}.lora_magnitude_vector"] = torch.ones(len(change))
    dora = tmp_path / "dora.safetensors"
    save_file(tensors, dora)
    with raises(LoadError, file=dora):
        convert(ConvertConfig(dora, "kohya"))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["dora.safetensors", "sdxl.safetensors"]


def test_a_file_without_a_recognizable_family_needs_a_base_model(tmp_path: Path) -> None:
    lora = fill(attach(tiny_pipeline("sd"), "lora", rank=2))
    path = formats.formats.get("kohya")().save(lora, tmp_path / "a")
    with raises(OptionError, option="base", file=path):
        convert(ConvertConfig(path, "diffusers"))
