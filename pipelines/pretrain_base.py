"""Pretrains the bundled base models: downloads, renders and captions data, then trains autoencoder, CLIP and UNet.

Afterwards it packages the weights and evaluates the packaged models: metrics, an image grid, loss curves and model cards.

Each stage saves its checkpoint, log and samples in the work folder, and resumes from them. `--stage` runs a single stage. The
bundled weights were trained by this pipeline.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from veneer import base_models
from veneer.base_models.pretraining import autoencoder, clip, denoiser, evaluation, image_grid, model_cards, packaging, warm_start
from veneer.base_models.pretraining.data import captions, photo_dataset
from veneer.base_models.pretraining.data.concepts import CLIP_SETS, DRAWN, KEPT_BACK, MORE_SETS, UNSEEN_SET
from veneer.base_models.pretraining.data.icon_sets import Pixels
from veneer.base_models.pretraining.data.mixture import Mixture
from veneer.base_models.pretraining.data.scenes import SIDE, sample_scenes
from veneer.base_models.pretraining.data.training_data import World
from veneer.injection import OptionError

COUNTS = {"drawn": 20000, "others": 8000, "shots": 9000, "cutouts": 6000}
"""Examples of each kind for the generator, beside those of single things."""
FITTED = 1024
"""Images from which the linear code of the autoencoder is found."""
WATCHED = 192


@dataclass(frozen=True)
class PretrainConfig:
    """Configuration of `veneer pretrain-base` and its defaults.

    Args:
        work: folder for everything that is downloaded, rendered and trained.
        stage: one of the stages `vae`, `clip`, `unet`, `decoder`, `package` and `evaluate`, or `all` in this order.
        photos: folder with real photos, `clothing-160/SPLIT/CLASS/*` and `subjects-more/SUBJECT/*` (default: none, icons only).
        init_from: folder of packaged base models to initialize from (default: random weights). `all` then keeps their encoder,
            unless its latents have fewer channels than the new ones.
        clip_steps: optimizer steps of the CLIP.
        unet_steps: optimizer steps of the UNet.
        decoder_steps: optimizer steps of the decoder.
        unet_decay: optimizer steps at the end over which the UNet's learning rate falls to zero; 0 keeps it constant.
        muon_lr: learning rate of the UNet's matrices.
        adam_lr: learning rate of the UNet's other parameters.
        bases: folder for the packaged base models (default: that of the installed package).
        results: folder for metrics, image grids and curves.
        seeds: images per prompt in the evaluation.
        prompts: prompts in the evaluation, at most 100.
    """

    work: Path = Path("runs/base")
    stage: str = "all"
    photos: Path | None = None
    init_from: Path | None = None
    clip_steps: int = 12000
    unet_steps: int = 8000
    decoder_steps: int = 1800
    unet_decay: int = 5000
    muon_lr: float = 2e-3
    adam_lr: float = 9e-4
    bases: Path = Path(base_models.__file__).parent
    results: Path = Path("docs/results/base")
    seeds: int = 3
    prompts: int = evaluation.NAMES


def begin_vae(world: World, config: PretrainConfig) -> None:
    """The encoder, which computes a linear code of patches; prints nothing, for its decoder knows nothing yet."""
    begun = config.init_from and AutoencoderKL.from_pretrained(config.init_from / "bundled/vae")
    former = begun if begun and begun.config["latent_channels"] != autoencoder.LATENT else None
    batches = [world.training_images(900 + i, 64) for i in range(FITTED // 64)]
    code = autoencoder.linear_code(autoencoder.to_tensor(np.concatenate(batches)), former)
    torch.manual_seed(0)
    autoencoder.init_linear_encoder(autoencoder.build(), code).save_pretrained(world.folder / "vae/model")


def train_decoder(world: World, config: PretrainConfig) -> None:
    """The decoder, at the latents that the UNet learns; prints its PSNR on concepts and a style that it never saw."""
    folder = world.folder / "vae"
    vae = AutoencoderKL.from_pretrained(folder / "model").to(memory_format=torch.channels_last)
    autoencoder.train_decoder(folder / "decoder", vae, world.training_images, config.decoder_steps, batch=10)
    vae.save_pretrained(folder / "refined")
    kept, style = autoencoder.psnr(vae, world.unseen_images(512)), autoencoder.psnr(vae, world.unseen_style(512))
    print(f"decoder: {kept:.2f} dB on kept-back concepts, {style:.2f} dB on an unseen style")


def train_clip(world: World, config: PretrainConfig) -> None:
    """The CLIP; prints retrieval of unseen renderings."""
    names, folder = world.words, world.folder / "clip"
    parts = clip.split(world.icons, names, CLIP_SETS, UNSEEN_SET, MORE_SETS)
    favored = frozenset([*DRAWN, *KEPT_BACK])
    views = clip.PhotoViews(world.photographs, world.cutouts, world.photos) if world.photographs else None
    torch.manual_seed(2)
    model = clip.NamedClip(len(world.tokenizer), len(world.names), len(views.instances) if views else 0)
    if config.init_from:
        warm_start.named_clip(model, config.init_from, world.tokenizer, world.names)
    model = clip.train(
        folder, model, world.icons, world.names, parts.seen, world.photos, world.tokenizer, config.clip_steps,
        favored=favored, views=views,
    )  # fmt: skip
    clip.save(model, world.tokenizer, folder / "model")
    for label, rows, among in (
        ("unseen renderings, all names", parts.unseen, names),
        ("unseen renderings, names of the generator", [r for r in parts.unseen if world.icons.words[r] in DRAWN], list(DRAWN)),
        ("unseen set, all names", parts.unseen_set, names),
    ):
        share = clip.retrieval(model.clip, world.icons, rows, among, world.tokenizer)
        print(f"clip: {label}: {share:.1%} of {len(rows)} at rank 1 among {len(among)}")


def train_unet(world: World, config: PretrainConfig) -> None:
    """The UNet and its text tower."""
    vae = AutoencoderKL.from_pretrained(world.folder / "vae" / "model").to(memory_format=torch.channels_last)
    mixture, tokens = Mixture(world, COUNTS), world.tokenizer
    marks = tokens.bos_token_id, tokens.eos_token_id
    latents = denoiser.encode(vae, mixture.rows, len(mixture.examples), world.folder / "pool.npy")
    watched = watched_images(world, vae)
    tokens.add_tokens(mixture.tokens)
    torch.manual_seed(1)
    model = denoiser.Denoiser(len(tokens), *marks)
    if config.init_from:
        warm_start.denoiser(model, config.init_from)
        print("unet: revived", ", ".join(warm_start.revive(model, *watched[""])) or "nothing")
    plan = denoiser.TrainingPlan(config.unet_steps, config.unet_decay, muon_lr=config.muon_lr, adam_lr=config.adam_lr)
    denoiser.train(world.folder / "unet", model, latents, mixture, tokens, watched, plan)


def watched_images(world: World, vae: AutoencoderKL) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Latents and token ids of scenes of icons, and of photos that no training sees."""
    scenes = sample_scenes(np.random.default_rng(22), world.drawn, WATCHED)
    pixels = {"": world.compositor(scenes)}
    said = {"": [world.full_caption(scene) for scene in scenes]}
    if world.photo_folder:
        rng = np.random.default_rng(4)
        photos = photo_dataset.clothes(world.photo_folder, "validation")
        chosen = [photos[i] for i in sorted(rng.permutation(len(photos))[: WATCHED // 2])]
        pixels["photo "] = np.stack([photo_dataset.crop(rng, photo.pixels, SIDE) for photo in chosen])
        said["photo "] = [f"a photo of {captions.article(photo.word)}" for photo in chosen]
    latents = {name: denoiser.encode(vae, _rows(found), len(found)) for name, found in pixels.items()}
    ids = {name: denoiser.tokenize(world.tokenizer, texts) for name, texts in said.items()}
    return {name: (torch.from_numpy(latents[name].astype(np.float32)), ids[name]) for name in pixels}


def _rows(pixels: Pixels) -> Callable[[int, int], Pixels]:
    return lambda first, last: pixels[first:last]


def write_bases(world: World, config: PretrainConfig) -> None:
    """The folders that ship, from the latest checkpoints."""
    packaging.write(world, config.bases)
    print(f"package: {packaging.weight(config.bases) / 1e6:.1f} MB of weights in {config.bases}")


def measure(world: World, config: PretrainConfig) -> None:
    """Metrics, image grid, curves and model cards of the packaged models."""
    metrics = evaluation.evaluate(world, config.bases, config.results, range(config.seeds), config.prompts)
    image_grid.curves(config.work, config.results / "curves.png")
    model_cards.write(metrics, config.bases)
    for kind in ("thing", "attribute"):
        for label, figure in metrics["generation"][kind].items():
            print(f"evaluate: {label}: {figure['percent']} % ({figure['low']} to {figure['high']})")


STAGES: dict[str, Callable[[World, PretrainConfig], None]] = {
    "vae": begin_vae,
    "clip": train_clip,
    "unet": train_unet,
    "decoder": train_decoder,
    "package": write_bases,
    "evaluate": measure,
}


def pretrain_base(config: PretrainConfig) -> None:
    """Run the stages.

    Raises:
        VeneerError: no such stage.
    """
    if config.stage not in ("all", *STAGES):
        message = f"stage is {config.stage!r}; there are: all, {', '.join(STAGES)}."
        raise OptionError(message, option="stage", given=config.stage, expected=("all", *STAGES))
    world = World(config.work, config.photos)
    if config.init_from:
        warm_start.unpack(config.init_from, config.work)
    every = [name for name in STAGES if not (name == "vae" and (config.work / "vae/model").is_dir())]
    for name in every if config.stage == "all" else [config.stage]:
        STAGES[name](world, config)


if __name__ == "__main__":
    from veneer.cli import main

    sys.exit(main(["pretrain-base", *sys.argv[1:]]))
