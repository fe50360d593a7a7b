"""The native file: everything that training changed, exactly once, and the same outputs after loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import veneer
from tests.formats.cases import fill, header, rewrite
from tests.injection.toy import ToyHost, net, run
from tests.raising import raises
from veneer.formats import inspect, load_all, native
from veneer.injection import LoadError, SaveError, attach, attachments
from veneer.testing.pipelines import tiny_pipeline
from veneer.testing.snapshot import assert_same, snapshot

PROMPT = "a photo of <toy> in the snow"


def step(model: nn.Module) -> None:
    """A forward pass in training mode, which moves BatchNorm's statistics."""
    model.train()
    model(**ToyHost().sample(model))
    model.eval()


def picture(pipe: Any, prompt: str = PROMPT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    image = pipe(prompt, num_inference_steps=2, guidance_scale=4.0, generator=generator, output_type="pt").images
    return image


def pivotal(pipe: Any) -> list[veneer.Attachment]:
    """New tokens and LoRA together."""
    return [
        fill(attach(pipe, "textual_inversion", tokens="<toy>", vectors=2, initialize="toy"), 1),
        fill(attach(pipe, "lora", where=["attn.{q,v}", "text/attn"], rank=3, alpha=2, by_site={"attn.v": {"rank": 5}}), 2),
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A file with two attachments, and the pipeline's output with them."""
    pipe = tiny_pipeline("sd")
    path = native.save(pivotal(pipe), tmp_path_factory.mktemp("pivotal") / "toy", provenance={"photos": 5})
    return path, picture(pipe)


def test_a_new_pipeline_generates_the_same_images_bitwise(saved: tuple[Path, torch.Tensor]) -> None:
    path, image = saved
    pipe = tiny_pipeline("sd")
    bare = picture(pipe)
    loaded = veneer.load_all(pipe, path)
    assert [a.name for a in loaded] == ["textual_inversion", "lora"]
    assert torch.equal(picture(pipe), image)
    assert not torch.equal(bare, image)
    for attachment in loaded:
        attachment.detach()
    assert torch.equal(picture(pipe), bare)


def test_load_of_a_file_with_several_attachments_names_load_all_and_attaches_nothing(
    saved: tuple[Path, torch.Tensor],
) -> None:
    pipe = tiny_pipeline("sd")
    bare = picture(pipe)
    with raises(LoadError, file=saved[0], where="attachments", given=("textual_inversion", "lora"), expected=1):
        veneer.load(pipe, saved[0])
    assert veneer.attachments(pipe) == []
    assert torch.equal(picture(pipe), bare)


def test_save_load_save_gives_the_same_bytes(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    path, _ = saved
    loaded = load_all(tiny_pipeline("sd"), path)
    assert loaded[1].provenance == {"photos": 5}
    assert loaded[1].where == ("attn.{q,v}", "text/attn")
    assert native.save(loaded, tmp_path / "again").read_bytes() == path.read_bytes()


def test_what_is_in_the_file(tmp_path: Path) -> None:
    """Names of tensors, and a header that describes them."""
    tuned = fill(attach(net(), "lora", where="attn.q", rank=2, name="mine", train="head"))
    written = header(tuned.save(tmp_path / "toy"))
    meta = json.loads(written.pop("__metadata__")["veneer"])
    assert list(written) == ["head:bias", "head:weight", "qkv.q:down", "qkv.q:up"]
    assert meta["version"] == 1
    assert meta["base"][""]["class"] == "Net"
    assert len(meta["base"][""]["fingerprint"]) == 64
    assert meta["base"][""]["without"] == ["head.bias", "head.weight"]
    (entry,) = meta["attachments"]
    assert (entry["name"], entry["method"], entry["where"], entry["train"]) == ("mine", "lora", ["attn.q"], ["head"])
    assert (entry["sites"], entry["trained"], entry["config"]["rank"]) == (["qkv.q"], ["head"], 2)


def test_trained_base_parameters_and_norm_statistics_come_back(tmp_path: Path) -> None:
    """A fresh head of other values is replaced; without the statistics the output would differ."""
    model = net()
    tuned = fill(attach(model, "lora", where="embed.token conv attn.{q,out}", rank=2, train="head norm"))
    step(model)
    path = tuned.save(tmp_path / "toy")
    fresh = net()
    nn.init.normal_(fresh.head.weight)
    before = snapshot(fresh)
    loaded = veneer.load(fresh, path)
    assert torch.equal(run(fresh), run(model))
    assert torch.equal(fresh.norm.running_var, model.norm.running_var)
    assert loaded.save(tmp_path / "again").read_bytes() == path.read_bytes()
    loaded.detach()
    assert_same(before, snapshot(fresh), "detach")


def test_tensors_that_sites_share_are_written_once(tmp_path: Path) -> None:
    tuned = fill(attach(net(), "lora", where="attn.{q,v}", rank=2))
    (_, first), (_, second) = tuned.parts.values()
    second.down = first.down
    path = tuned.save(tmp_path / "toy")
    assert [k for k in header(path) if k.endswith(":down")] == ["qkv.q:down"]
    loaded = veneer.load(net(), path).state_dict()
    assert all(torch.equal(loaded[k], t) for k, t in tuned.state_dict().items())
    assert len(loaded) == 4


def test_one_statistic_of_two_attachments_is_written_once(tmp_path: Path) -> None:
    model = net()
    both = [fill(attach(model, "lora", where="attn.q", rank=2, name=name)) for name in "ab"]
    step(model)
    path = native.save(both, tmp_path / "toy")
    assert [k for k in header(path) if "running_mean" in k] == ["a/norm:running_mean"]
    fresh = net()
    veneer.load_all(fresh, path)
    assert torch.equal(run(fresh), run(model))


@pytest.mark.parametrize("given", ["toy", "toy.safetensors", "v1.5"])
def test_the_suffix_is_added_and_may_be_left_out(tmp_path: Path, given: str) -> None:
    path = fill(attach(net(), "bitfit")).save(tmp_path / given)
    assert path == tmp_path / (given if given.endswith(".safetensors") else given + ".safetensors")
    assert veneer.load(net(), tmp_path / given).method.name == "bitfit"


def test_a_folder_holds_adapter_safetensors(tmp_path: Path) -> None:
    assert fill(attach(net(), "bitfit")).save(tmp_path) == tmp_path / "adapter.safetensors"
    (tmp_path / "other.safetensors").write_bytes(b"not looked at")
    assert veneer.load(net(), str(tmp_path)).name == "bitfit"


def test_names_and_strength_are_the_callers(saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    model = net()
    path = fill(attach(net(), "lora", where="head", rank=2)).save(tmp_path / "toy")
    bare = run(model)
    names = [veneer.load(model, path, **options).name for options in ({}, {}, {"name": "mine"}, {"scale": 0.0})]
    assert names == ["lora", "lora_2", "mine", "lora_3"]
    for attachment in attachments(model):
        attachment.scale = 0
    assert torch.equal(run(model), bare)
    assert [a.name for a in load_all(tiny_pipeline("sd"), saved[0], name="cat")] == ["cat-textual_inversion", "cat-lora"]


def test_a_part_of_a_pipeline_takes_what_was_made_on_the_pipeline(tmp_path: Path) -> None:
    """And the other way round, options by site name included."""
    options = {"where": ["attn.q", "name:unet.conv_in"], "rank": 2, "by_site": {"name:unet.conv_in": {"rank": 3}}}
    pipe = tiny_pipeline("sd")
    tuned = fill(attach(pipe, "lora", **options))
    path = tuned.save(tmp_path / "toy")
    bare = veneer.load(tiny_pipeline("sd").unet, path)
    assert [len(p) for k, p in bare.named_parameters() if k == "conv_in:down"] == [3]
    back = veneer.load(tiny_pipeline("sd"), bare.save(tmp_path / "bare"))
    assert all(torch.equal(back.state_dict()[k], t) for k, t in tuned.state_dict().items())


def test_a_base_in_half_precision_matches(saved: tuple[Path, torch.Tensor]) -> None:
    assert load_all(tiny_pipeline("sd").to(torch.float16), saved[0])[1].loaded.clean


def test_loading_leaves_the_random_state_and_keeps_every_tensor(tmp_path: Path) -> None:
    path = fill(attach(net(), "lora", where="head", rank=2, dropout=0.5)).save(tmp_path / "toy")
    model = net()
    before = torch.get_rng_state()
    veneer.load(model, path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(run(model), run(model))


def test_a_trained_base_is_compared_as_it_was_before(tmp_path: Path) -> None:
    """A second adapter, saved while a first one has changed the head, fits a base with the old head."""
    model = net()
    fill(attach(model, "lora", where="embed.token", rank=2, train="head", name="first"))
    path = fill(attach(model, "lora", where="attn.q", rank=2)).save(tmp_path / "toy")
    assert veneer.load(net(), path).loaded.clean


def test_a_merged_base_is_rejected(tmp_path: Path) -> None:
    model = net()
    tuned = fill(attach(model, "lora", where="head", rank=2))
    path = tuned.save(tmp_path / "toy")
    tuned.merge()
    with raises(SaveError, where="lora", given="merged"):
        native.save(tuned, tmp_path / "toy")
    with raises(LoadError, where="lora", given="merged"):
        veneer.load(model, path)


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: [], {"given": 0, "expected": 1}),
        (lambda: [attach(net(), "bitfit"), attach(net(), "bitfit")], {"where": "bitfit", "given": 2}),
        (
            lambda: [attach(net(), "bitfit", name="a"), attach(net(), "bitfit", name="b")],
            {"where": "b", "given": "on another model"},
        ),
    ],
)
def test_lists_that_cannot_be_saved(tmp_path: Path, make: Any, data: dict[str, Any]) -> None:
    with raises(SaveError, **data):
        native.save(make(), tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("revision", [0, -1, "1", 1.0, True, 99])
def test_an_unknown_revision_of_the_method(revision: Any, tmp_path: Path) -> None:
    path = fill(attach(net(), "bitfit")).save(tmp_path / "toy")

    def change(header: dict[str, Any]) -> None:
        own = json.loads(header["__metadata__"]["veneer"])
        own["attachments"][0]["revision"] = revision
        header["__metadata__"]["veneer"] = json.dumps(own)

    data = {"where": "bitfit", "given": 99, "expected": 1} if revision == 99 else {"where": "veneer", "expected": 1}
    with raises(LoadError, **data):
        veneer.load(net(), rewrite(path, change))


def test_a_file_of_the_first_revision_of_lora(tmp_path: Path) -> None:
    """Ranks and alphas by site were options of their own."""
    by_site = {"name:conv": {"rank": 3}, "attn.q": {"rank": 2, "alpha": 5.0}}
    attachment = fill(attach(net(), "lora", where="conv attn.q mlp", rank=4, by_site=by_site))

    def change(found: dict[str, Any]) -> None:
        own = json.loads(found["__metadata__"]["veneer"])
        entry = own["attachments"][0]
        assert entry.pop("revision") == 2
        assert entry["config"].pop("by_site") == by_site
        entry["config"] |= {"ranks": {"name:conv": 3, "attn.q": 2}, "alphas": {"attn.q": 5.0}}
        found["__metadata__"]["veneer"] = json.dumps(own)

    path = rewrite(attachment.save(tmp_path / "x"), change)
    assert {block.ranks for block in inspect(path).blocks} == {(2,), (3,), (4,)}
    loaded = veneer.load(net(), path)
    assert loaded.method == attachment.method
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), attachment.state_dict().values(), strict=True))


def test_provenance_must_be_json(tmp_path: Path) -> None:
    with raises(SaveError, where="header", expected="JSON"):
        native.save(attach(net(), "bitfit"), tmp_path / "toy", provenance={"path": tmp_path})
    assert list(tmp_path.iterdir()) == []
