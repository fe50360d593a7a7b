"""Initial weights from a file: same outputs, other ranks and scales, and mismatches that name both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.raising import raises
from veneer.formats import kohya, load_all, native
from veneer.injection import LoadError, methods
from veneer.testing.pipelines import tiny_pipeline
from veneer.training import attach_methods
from veneer.training.fixed_adapters import attach_fixed, read_fixed
from veneer.training.initial_adapter import read_initial, trigger_words

WHERE = {"lora": ("attn",), "dora": ("attn",), "loha": ("attn",)}


def attach_new(pipe: Any, name: str, where: Any = None, seed: int = 0, **options: Any) -> list[Any]:
    return attach_methods.attach_all(pipe, [methods.get(name)(**options)], where or WHERE, text_encoder=False, seed=seed)


def train(attached: list[Any], seed: int = 1) -> None:
    """Random values for all parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for attachment in attached:
            for parameter in attachment.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def output(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    unet = pipe.unet.eval()
    sample = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator)
    states = torch.randn(1, 4, unet.config.cross_attention_dim, generator=generator)
    return unet(sample, torch.tensor([3]), states).sample


def file_of(folder: Path, name: str = "lora", save: Any = native.save, where: Any = None, **options: Any) -> tuple[Path, Tensor]:
    """A file of a trained adapter, and the output of the model with it."""
    pipe = tiny_pipeline("sd")
    attached = attach_new(pipe, name, where, **options)
    train(attached)
    expected = output(pipe)
    return save(attached[0], folder / f"{name}.safetensors"), expected


def start_from(path: Path, name: str = "lora", where: Any = None, **options: Any) -> tuple[Any, list[Any], list[str]]:
    pipe = tiny_pipeline("sd")
    config = methods.get(name)(**options)
    initial = read_initial(pipe, path, [config])
    attached = attach_new(pipe, name, where, **options)
    return pipe, attached, initial.load_into(attached)


@pytest.mark.parametrize("save", [native.save, kohya.save])
@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 4, "alpha": 1.0}, {"rank": 7, "alpha": 3.0}])
def test_a_run_starts_where_the_file_ended(tmp_path: Path, save: Any, options: dict[str, Any]) -> None:
    """Also with another alpha, or a higher rank."""
    path, expected = file_of(tmp_path, save=save, rank=4, alpha=2.0)
    pipe, attached, notes = start_from(path, **options)
    torch.testing.assert_close(output(pipe), expected, rtol=1e-5, atol=1e-5)
    assert notes == []
    assert len(attached) == 1
    assert not torch.allclose(output(tiny_pipeline("sd")), expected, rtol=1e-3, atol=1e-3)


def test_spare_rank_can_train(tmp_path: Path) -> None:
    """The rows of A beyond the file's rank keep their random initial values, so that B gets a gradient there."""
    path, _ = file_of(tmp_path, rank=2)
    _, attached, _ = start_from(path, rank=5)
    fresh = attach_new(tiny_pipeline("sd"), "lora", rank=5)[0]
    for name, (_, adapter) in attached[0].parts.items():
        assert torch.equal(adapter.down[2:], fresh.parts[name][1].down[2:])
        assert adapter.down[2:].abs().sum(1).min() > 0
        assert not adapter.up[:, 2:].any()
        assert adapter.up[:, :2].any()


def test_a_higher_rank_is_reduced_by_svd(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path, rank=4, alpha=4.0)
    _, attached, notes = start_from(path, rank=2, alpha=1.0)
    trained = load_all(tiny_pipeline("sd"), path)[0]
    for name, (_, adapter) in attached[0].parts.items():
        source = trained.parts[name][1]
        delta = source.scaling * source.up @ source.down
        u, s, vh = torch.linalg.svd(delta.double())
        expected = (u[:, :2] * s[:2] @ vh[:2]).float()
        torch.testing.assert_close(adapter.scaling * adapter.up @ adapter.down, expected, rtol=1e-4, atol=1e-5)
    assert len(notes) == 1


def test_reading_leaves_the_model_and_the_random_generator_as_they_are(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path, rank=4)
    pipe = tiny_pipeline("sd")
    before, state = output(pipe), torch.get_rng_state()
    keys = list(pipe.unet.state_dict())
    read_initial(pipe, path, [methods.get("lora")(rank=2)])
    assert torch.equal(output(pipe), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pipe.unet.state_dict()) == keys


def test_another_method_names_both(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path, rank=2)
    with raises(LoadError, where="method", given=("lora",), expected=("loha",), file=path):
        start_from(path, "loha", rank=2)


def test_other_sites_name_both(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path, where={"lora": ("attn.{q,k}",)}, rank=2)
    with pytest.raises(LoadError) as caught:
        start_from(path, where={"lora": ("attn.{q,v}",)}, rank=2)
    assert caught.value.where == "sites"
    assert {name.rpartition("_")[2] for name in caught.value.given} == {"k"}
    assert {name.rpartition("_")[2] for name in caught.value.expected} == {"v"}


def test_another_base_model_is_an_error(tmp_path: Path) -> None:
    path, _ = file_of(tmp_path, rank=2)
    pipe = tiny_pipeline("sd")
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1
    with pytest.raises(LoadError) as caught:
        read_initial(pipe, path, [methods.get("lora")(rank=2)])
    assert caught.value.where == "unet"


def test_a_method_that_cannot_be_resized_says_so(tmp_path: Path) -> None:
    path, expected = file_of(tmp_path, "loha", rank=2)
    pipe, _, _ = start_from(path, "loha", rank=2)
    torch.testing.assert_close(output(pipe), expected)
    with pytest.raises(LoadError) as caught:
        start_from(path, "loha", rank=3)
    assert caught.value.file == str(path)
    assert caught.value.given != caught.value.expected


def test_options_that_change_the_outputs_must_be_the_same(tmp_path: Path) -> None:
    where = {"adaptformer": ("mlp",)}
    path, expected = file_of(tmp_path, "adaptformer", where=where, bottleneck=4, scale=0.1)
    pipe, _, _ = start_from(path, "adaptformer", where, bottleneck=4, scale=0.1, dropout=0.0)
    torch.testing.assert_close(output(pipe), expected)
    with raises(LoadError, where="options", given={"scale": 0.1}, expected={"scale": 0.5}):
        start_from(path, "adaptformer", where, bottleneck=4, scale=0.5)


def test_a_token_embedding_starts_from_the_file_under_the_name_of_the_run(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    first = attach_methods.attach_all(
        pipe, attach_methods.build_methods("textual_inversion", {}, "<old>", "cat"), {}, text_encoder=False, seed=0
    )
    train(first)
    rows = {key: tensor.clone() for key, tensor in first[0].state_dict().items()}
    path = native.save(first[0], tmp_path / "token", provenance={"concept": "<old>", "class_word": "cat"})
    pipe = tiny_pipeline("sd")
    configs = attach_methods.build_methods("textual_inversion", {}, "<new>", "dog")
    initial = read_initial(pipe, path, configs)
    attached = attach_methods.attach_all(pipe, configs, {}, text_encoder=False, seed=0)
    initial.load_into(attached)
    assert all(torch.equal(tensor, rows[key]) for key, tensor in attached[0].state_dict().items())
    assert attached[0].method.config()["tokens"] == "<new>"
    assert trigger_words(path, "", "") == {"concept": "<old>", "class_word": "cat"}
    assert trigger_words(path, "<toy>", "") == {"concept": "<toy>", "class_word": "cat"}
    assert trigger_words(None, "", "toy") == {"concept": "", "class_word": "toy"}


def test_fixed_adapters_are_frozen_at_their_strength(tmp_path: Path) -> None:
    path, expected = file_of(tmp_path, rank=2)
    pipe = tiny_pipeline("sd")
    plain = output(pipe)
    (full,) = attach_fixed(pipe, read_fixed([str(path)]))
    torch.testing.assert_close(output(pipe), expected)
    assert not any(p.requires_grad for p in full.parameters())
    assert not any(module.training for _, module in full.parts.values())
    full.detach()
    (half,) = attach_fixed(pipe, read_fixed([f"{path}:0.5"]))
    assert half.scale == 0.5
    assert not torch.equal(output(pipe), plain)
    assert not torch.allclose(output(pipe), expected, rtol=1e-4, atol=1e-4)
