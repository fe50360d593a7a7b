"""The verdict of a personalization run, from its metrics.

With the gain of similarity over the base (paired, 95 %), the base's similarity b and that of the photos to one another c:

- **similarity rose** if the whole interval of the gain is above 0, and **rose far** if it is above half of c − b, the
  distance from the base to the photos (not known with one photo; true where c ≤ b and similarity rose);
- **the prompt was lost** if less than half of the base's `layout` is left, the whole interval of the paired difference below 0
  (known where the prompts say where things are: where the whole interval of the base's own is above 0);
- **other images changed** if the whole interval of the drift is above half the distance between the base's images of two
  different unrelated prompts: an image has then moved halfway to another prompt's;
- **the class was lost** if less than 2/3 of the base's prompt similarity is left, the whole interval of the paired difference
  below 0. This counts only where the mean share is below 2/3 and similarity did not rise far: prompts are compared with the class
  word instead of the concept, and an octopus that was trained with the class word "fish" is rightly less similar to "a fish"
  (0.05 against 0.43 in the bundled example).

| similarity | something lost or changed | outcome |
|---|---|---|
| rose far | no | `learned` |
| rose far | prompt or other images | `overfitted` |
| rose, share ≥ 1/4 or unknown | no | `partly` |
| rose, share < 1/4 | no | `not_learned` |
| rose, share ≥ 1/2 | any of the three | `overfitted` |
| rose, share < 1/2 or unknown | any of the three | `not_learned` |
| did not rise | any of the three | `not_learned` |
| did not rise, mean gain below half of c − b | no | `not_learned` |
| did not rise, mean gain above it or c unknown | no | `unknown`: too few images to tell |

Without scores, or with one image and so without intervals, the outcome is `unknown`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evaluation.local_features import OFF
from .metrics import Metrics, PairedMetric
from .verdict import Verdict

if TYPE_CHECKING:
    from ..personalization_config import PersonalizeConfig

SHARE = 1 / 2
"""Fraction of the distance from the base model's similarity to that of the photos, for `learned`."""
LITTLE = 1 / 4
"""Fraction of that distance; below it, images share only colors with the photos, even if the gain is significant."""
KEPT = 2 / 3
"""Fraction of the base model's prompt similarity."""
FOLLOWED = 1 / 2
"""Fraction of the base model's layout."""
MOVED = 1 / 2
"""Fraction of the distance between the base model's images of two unrelated prompts."""
REAL_BASE = (
    "the bundled base model generates 128-pixel images and is better at icons than photos; for photos use a larger one, such as "
    "--base stable-diffusion-v1-5/stable-diffusion-v1-5"
)
MORE_IMAGES = "evaluate more images: --eval-seeds 3"
EVALUATE = "generate images at the end: --eval full"
NAME_FEATURES = "measure by a CLIP: --features transformers:openai/clip-vit-large-patch14"


def personal_verdict(metrics: Metrics | None, config: PersonalizeConfig) -> Verdict:
    """The verdict of a finished run.

    Args:
        metrics: None if nothing was evaluated. `config`: completed, for the advice.
    """
    if metrics is None:
        return _without_scores(config)
    share, rose, far = similarity_share(metrics), metrics.similarity.clear, _rose_far(metrics)
    lost, kept = _changes(metrics, far or (share is not None and share >= KEPT))
    reasons = (_similarity(metrics, share), *lost, *kept)
    if metrics.similarity.gain.low is None:
        return Verdict("unknown", "One image is too few to tell.", reasons, (MORE_IMAGES,))
    if rose:
        if lost and (far or (share is not None and share >= SHARE)):
            summary = "Images are more similar to the photos, but follow the prompt less, or images of other prompts changed."
            return Verdict("overfitted", summary, reasons, _gentler(config))
        if far:
            place, advice = _place(metrics)
            return Verdict("learned", f"Images are clearly more similar to the photos.{place}", reasons, advice)
        if lost:
            summary = (
                "Images are not similar enough to the photos, and follow the prompt less, or images of other prompts changed."
            )
            return Verdict("not_learned", summary, reasons, _gentler(config))
        if share is not None and share >= SHARE:
            summary = "Images are more similar to the photos; too few were evaluated to be sure by how much."
            return Verdict("partly", summary, reasons, (MORE_IMAGES, *_longer(config)))
        if share is not None and share < LITTLE:
            summary = "Images are only a little more similar to the photos."
            return Verdict("not_learned", summary, reasons, _longer(config))
        summary = "Images are somewhat more similar to the photos."
        if share is None:
            summary += " With one photo there is no telling how similar they could be."
        return Verdict("partly", summary, reasons, _longer(config))
    if lost:
        summary = (
            "Images are not clearly more similar to the photos, and follow the prompt less, or images of other prompts changed."
        )
        return Verdict("not_learned", summary, reasons, _gentler(config))
    if share is None or share >= SHARE:
        return Verdict("unknown", "Too few images to tell: the gain may be chance.", reasons, (MORE_IMAGES,))
    return Verdict("not_learned", "Images are not clearly more similar to the photos than without.", reasons, _longer(config))


def _without_scores(config: PersonalizeConfig) -> Verdict:
    if config.eval == "none":
        return Verdict("unknown", "It was not evaluated.", ("No images were generated, so there are no scores.",), (EVALUATE,))
    summary = "It was not measured; look at before_after.png."
    if config.features == OFF:
        why = "There is no feature model (--features none, or no CLIP or DINOv2 in the local cache), so there are no scores."
        return Verdict("unknown", summary, (why,), (NAME_FEATURES,))
    return Verdict("unknown", summary, ("Metrics are disabled (--eval-seeds 0), so there are no scores.",), (MORE_IMAGES,))


def similarity_share(metrics: Metrics) -> float | None:
    """Share of the distance from the base's similarity to the photos' own that was covered; 1 if the base is not below them, None
    with one photo."""
    if metrics.ceiling is None:
        return None
    distance = metrics.ceiling.mean - metrics.similarity.base.mean
    return metrics.similarity.gain.mean / distance if distance > 0 else 1.0


def _rose_far(metrics: Metrics) -> bool:
    """Whether the whole interval of the gain is above `SHARE` of the distance from the base to the photos."""
    gain, ceiling = metrics.similarity.gain, metrics.ceiling
    if gain.low is None or ceiling is None:
        return False
    return gain.low > max(0.0, SHARE * (ceiling.mean - metrics.similarity.base.mean))


def _similarity(metrics: Metrics, share: float | None) -> str:
    found = metrics.similarity
    text = (
        f"Similarity to the photos is {found.adapted.mean:.2f} with the adapter and {found.base.mean:.2f} without: gain "
        f"{found.gain}"
    )
    if metrics.ceiling is None or share is None:
        return f"{text}."
    return f"{text}, {max(0.0, share):.0%} of the way to the photos' similarity to one another, {metrics.ceiling.mean:.2f}."


def _changes(metrics: Metrics, near: bool) -> tuple[list[str], list[str]]:
    """Sentences on what was lost, and on what was not. `near`: images came near the photos, whose class may be another."""
    lost, kept = list[str](), list[str]()
    prompt, place, drift = metrics.prompt_similarity, metrics.layout, metrics.drift
    if prompt:
        words = (
            f"Similarity to the prompt, with the class word, is {prompt.adapted.mean:.2f} with the adapter and "
            f"{prompt.base.mean:.2f} without: difference {prompt.gain}."
        )
        (lost if not near and _fell(prompt, KEPT) else kept).append(words)
    if place and _says_place(metrics):
        share = max(0.0, place.adapted.mean / place.base.mean)
        words = f"Background and place follow the prompt {share:.0%} as much as without the adapter."
        (lost if _fell(place, FOLLOWED) else kept).append(words)
    if drift:
        apart = metrics.unrelated_distance
        scale = f"; two different prompts are {apart:.2f} apart" if apart else ""
        moved = drift.low is not None and apart is not None and drift.low > MOVED * apart
        (lost if moved else kept).append(f"Images of other prompts changed by {drift}{scale}.")
    return lost, kept


def _place(metrics: Metrics) -> tuple[str, tuple[str, ...]]:
    """Sentence on place and background where nothing is lost by its interval, and advice."""
    if metrics.layout is None or not _says_place(metrics):
        return "", ()
    if metrics.layout.adapted.mean >= FOLLOWED * metrics.layout.base.mean:
        return " Place and background still follow the prompt.", ()
    return " Place and background follow the prompt less in too few images to be sure.", (MORE_IMAGES,)


def _says_place(metrics: Metrics) -> bool:
    """Whether the prompts say where things are: the base's own images show it."""
    return metrics.layout is not None and (metrics.layout.base.low or 0.0) > 0


def _fell(found: PairedMetric, share: float) -> bool:
    """Less than `share` of the base's is left, and the whole interval of the difference is below 0."""
    return found.gain.high is not None and found.gain.high < 0 and found.adapted.mean < share * found.base.mean


def _longer(config: PersonalizeConfig) -> tuple[str, ...]:
    """Advice if too little was learned."""
    usual, steps = config.default_steps(), config.steps or 0
    found = [f"train longer: --steps {max(usual, 2 * steps)}"]
    if config.method in ("textual_inversion", "p_plus"):
        found.append("train more parameters: --method lora")
    return (*found, *_words(config), *_base(config))


def _gentler(config: PersonalizeConfig) -> tuple[str, ...]:
    """Advice if something was lost."""
    usual = config.default_steps()
    found = [f"train for the default number of steps: --steps {usual}"] if (config.steps or 0) < usual else []
    found.append(f"lower the learning rate: --learning-rate {config.main_rate() / 2:g}")
    if not config.class_images:
        word = "" if config.class_word else " --class-word WORD"
        found.append(f"preserve the class with class images: --class-images 32{word}")
    return (*found, *_words(config), *_base(config))


def _words(config: PersonalizeConfig) -> tuple[str, ...]:
    if config.class_word:
        return ()
    return ("set the class of the subject to a word that the base model generates well: --class-word WORD",)


def _base(config: PersonalizeConfig) -> tuple[str, ...]:
    return (REAL_BASE,) if config.base == "bundled" else ()
