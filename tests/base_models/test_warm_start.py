"""Initialization of a training from packaged weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from veneer.pipelines import pretrain_base

from veneer import base_models
from veneer.base_models.pretraining import clip, denoiser, warm_start
from veneer.base_models.pretraining.autoencoder import LATENT

WIDTHS = (16, 16, 16)
BASES = base_models.path().parent


@torch.no_grad()
def test_denoiser_from_packaged_weights() -> None:
    pipe = base_models.load("bundled")
    tokens = pipe.tokenizer
    model = denoiser.Denoiser(len(tokens), tokens.bos_token_id, tokens.eos_token_id)
    warm_start.denoiser(model, BASES)
    noisy, t = torch.randn(2, LATENT, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([900, 100])
    ids = denoiser.tokenize(tokens, ["an apple", "a photo of a shirt"])
    theirs = pipe.unet(noisy, t, pipe.text_encoder(ids).last_hidden_state).sample
    torch.testing.assert_close(model.eval()(noisy, t, ids), theirs)


def small_denoiser(vocabulary: int = 60) -> denoiser.Denoiser:
    torch.manual_seed(0)
    return denoiser.Denoiser(vocabulary, 1, 2, widths=WIDTHS).eval()


def inputs(channels: int = LATENT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(6, channels, 16, 16, generator=generator)
    ids = torch.randint(3, 50, (6, 24), generator=generator)
    return noisy, torch.tensor([999, 800, 600, 400, 200, 10]), torch.cat([ids[:, :-1], torch.full((6, 1), 2)], 1)


@torch.no_grad()
def test_missing_channels_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(denoiser, "LATENT", 8)
        former = small_denoiser(50)
    for part, name in ((former.unet, "unet/diffusion_pytorch_model"), (former.text, "text_encoder/model")):
        file = tmp_path / f"bundled/{name}.safetensors"
        file.parent.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in part.state_dict().items()}, file)
    model = small_denoiser(60)
    warm_start.denoiser(model, tmp_path)
    noisy, t, ids = inputs()
    found = model(noisy, t, ids)
    torch.testing.assert_close(found[:, :8], former(noisy[:, :8], t, ids))  # whatever the further channels hold
    assert not found[:, 8:].any()
    tokens = model.text.get_input_embeddings().weight
    assert torch.equal(tokens[:50], former.text.get_input_embeddings().weight)
    assert tokens[50:].std() > 0


def test_revive_dead_block_keeps_the_output() -> None:
    model = small_denoiser()
    dead = model.unet.down_blocks[1].resnets[0]
    with torch.no_grad():  # scale -1 and shift -40: the second convolution gets silu(-40)
        width = dead.out_channels
        dead.time_emb_proj.weight.zero_()
        dead.time_emb_proj.bias.copy_(torch.cat([torch.full((width,), -1.0), torch.full((width,), -40.0)]))
    noisy, t, ids = inputs()

    def gradients() -> tuple[torch.Tensor, float, float]:
        model.zero_grad()
        found = model(noisy, t, ids)
        found.square().mean().backward()
        return found.detach(), dead.conv1.weight.grad.norm().item(), dead.conv2.weight.grad.norm().item()

    before, _, silent = gradients()
    assert warm_start.revive(model, noisy, ids) == ["down_blocks.1.resnets.0"]
    after, _, heard = gradients()
    torch.testing.assert_close(after, before)
    assert silent < 1e-12
    assert heard > 1e-6
    with torch.no_grad():  # its second convolution begins at zero, and with the first step the first hears too
        dead.conv2.weight -= 0.1 * dead.conv2.weight.grad
    assert gradients()[1] > 1e-9
    assert warm_start.revive(model, noisy, ids) == []


def test_revive_keeps_other_blocks() -> None:
    model, again = small_denoiser(), small_denoiser()
    noisy, _, ids = inputs()
    assert warm_start.revive(model, noisy, ids) == []
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_clip_prototypes_from_text_features() -> None:
    names = ["apple", "fox", "rocket", "guitar"]
    tokenizer = base_models.load("bundled").tokenizer
    model = clip.NamedClip(len(tokenizer), len(names))
    warm_start.named_clip(model, base_models.path("bundled").parent, tokenizer, names)
    assert 10 < model.log_scale.exp().item() <= 40.5  # the temperature that it was trained to, in half precision
    with torch.no_grad():
        logits = model.eval().logits(model.clip.encode_text(clip.ids_of(tokenizer, [f"a {name}" for name in names])))
    assert logits.argmax(1).tolist() == [0, 1, 2, 3]
    assert model.prototypes.detach().square().mean() == pytest.approx(1, rel=1e-5)  # as those drawn at random


def test_unpack_keeps_existing_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "own").touch()
    warm_start.unpack(BASES, tmp_path)
    assert [f.name for f in (tmp_path / "tokenizer").iterdir()] == ["own"]
    assert (tmp_path / "vae" / "model" / "config.json").is_file()


def test_unpack_skips_an_autoencoder_of_fewer_channels(tmp_path: Path) -> None:
    packaged, work = tmp_path / "bases", tmp_path / "work"
    (packaged / "bundled/tokenizer").mkdir(parents=True)
    (packaged / "bundled/vae").mkdir()
    (packaged / "bundled/vae/config.json").write_text('{"latent_channels": 8}')
    former = {"unet": {"step": 30}, "vae": {"step": 14}, "decoder": {"step": 9}}
    training = {"unet": {"step": 50}, "decoder": {"step": 18}, "begun": former}
    (packaged / "bundled/training.json").write_text(json.dumps(training))
    warm_start.unpack(packaged, work)
    assert not (work / "vae").exists()
    assert json.loads((work / "begun.json").read_text()) == {"unet": {"step": 50}, "begun": {"unet": {"step": 30}}}
    (packaged / "bundled/vae/config.json").write_text(json.dumps({"latent_channels": LATENT}))
    warm_start.unpack(packaged, tmp_path / "again")
    assert (tmp_path / "again/vae/model/config.json").is_file()
    assert json.loads((tmp_path / "again/begun.json").read_text()) == training


def test_all_stages_keep_a_packaged_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for name in pretrain_base.STAGES:
        monkeypatch.setitem(pretrain_base.STAGES, name, lambda world, config, name=name: made.append(name))
    begun, anew = tmp_path / "begun", tmp_path / "anew"
    pretrain_base.pretrain_base(pretrain_base.PretrainConfig(work=begun, init_from=BASES))
    assert made == ["clip", "unet", "decoder", "package", "evaluate"]
    made.clear()
    pretrain_base.pretrain_base(pretrain_base.PretrainConfig(work=anew))
    assert made == ["vae", "clip", "unet", "decoder", "package", "evaluate"]
    assert not anew.exists()
