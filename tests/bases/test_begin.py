"""Packaged weights are what a further training begins from."""

from pathlib import Path

import pytest
import torch
from veneer.pipelines import pretrain_base

from veneer import bases
from veneer.bases.recipe import begin, clip, diffusion


def test_a_denoiser_begins_as_the_packaged_one() -> None:
    pipe = bases.load("shipped")
    tokens = pipe.tokenizer
    model = diffusion.Denoiser(len(tokens), tokens.bos_token_id, tokens.eos_token_id)
    begin.denoiser(model, bases.path("shipped").parent)
    noisy, t = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([900, 100])
    ids = diffusion.tokenize(tokens, ["an apple", "a small fox, left"])
    with torch.no_grad():
        theirs = pipe.unet(noisy, t, pipe.text_encoder(ids).last_hidden_state).sample
        torch.testing.assert_close(model.eval()(noisy, t, ids), theirs)


def test_a_clip_begins_with_prototypes_that_its_phrases_find() -> None:
    names = ["apple", "fox", "rocket", "guitar"]
    tokenizer = bases.load("shipped").tokenizer
    model = clip.NamedClip(len(tokenizer), len(names))
    begin.named_clip(model, bases.path("shipped").parent, tokenizer, names)
    assert 10 < model.log_scale.exp().item() <= 40.5  # the temperature that it was trained to, in half precision
    with torch.no_grad():
        logits = model.eval().logits(model.clip.encode_text(clip.ids_of(tokenizer, [f"a {name}" for name in names])))
    assert logits.argmax(1).tolist() == [0, 1, 2, 3]
    assert model.prototypes.detach().square().mean() == pytest.approx(1, rel=1e-5)  # as those drawn at random


def test_only_what_is_missing_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "own").touch()
    begin.unpack(bases.path("shipped").parent, tmp_path)
    assert [f.name for f in (tmp_path / "tokenizer").iterdir()] == ["own"]
    assert (tmp_path / "vae" / "model" / "config.json").is_file()


def test_all_stages_leave_a_packaged_autoencoder_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for name in pretrain_base.STAGES:
        monkeypatch.setitem(pretrain_base.STAGES, name, lambda world, config, name=name: made.append(name))
    begun, anew = tmp_path / "begun", tmp_path / "anew"
    pretrain_base.pretrain_base(pretrain_base.PretrainConfig(work=begun, begin=bases.path("shipped").parent))
    assert made == ["clip", "unet", "decoder", "package", "evaluate"]
    made.clear()
    pretrain_base.pretrain_base(pretrain_base.PretrainConfig(work=anew))
    assert made == ["vae", "clip", "unet", "decoder", "package", "evaluate"]
    assert not anew.exists()
