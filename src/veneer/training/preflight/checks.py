"""Preflight checks: pure functions from the settings of a run to `Concern`s."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from veneer.injection.sites import VocabularySite

from ..data.photo_checks.findings import PhotoFinding
from ..data.photo_folder import Photo
from ..data.photo_folder import photo_warnings as photo_warnings
from ..loop.config import TrainConfig
from .estimates import size

if TYPE_CHECKING:
    from veneer.injection.attachment.attachment import Attachment

    from ..families import Family
    from ..loop.optimizers import ParameterGroup

HIGH, LOW = 5.0, 1 / 20
"""Warn about a learning rate above `HIGH` or below `LOW` times the default: too high diverges, too low is only slow."""
ADAPTIVE = ("adamw", "adamw8bit", "adafactor")
"""Optimizers that the default learning rates of the methods apply to."""
FEW_PHOTOS = 3
VIEWS = (10, 1500)
"""Expected range of repeats of each photo: fewer underfit, more overfit."""
RARE = 0.9
"""In a large vocabulary, ids are sorted by frequency, so a token in the last tenth is rare."""
LARGE = 30_000


@dataclass(frozen=True)
class Concern:
    """A finding of a preflight check.

    Args:
        about: `photos`, `concept`, `prompt`, `learning rate`, `steps`, `resolution`, `sites`, `memory` or `disk`.
        message: what was found and what to do.
        severity: `error` if the run cannot work, `warning` for a probable mistake, `note` for information.
        finding: what was measured, of a concern about a single photo.
    """

    about: str
    message: str
    severity: Literal["error", "warning", "note"] = "warning"
    finding: PhotoFinding | None = None

    def __str__(self) -> str:
        return f"{self.severity}: {self.about}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """The concern as JSON values."""
        measured = {"finding": self.finding.as_dict()} if self.finding else {}
        return {"about": self.about, "severity": self.severity, "message": self.message, **measured}


def sites(attachments: Sequence[Attachment]) -> Iterator[Concern]:
    """Checks for trainable parameters, sites without effect, and blocks with missing roles."""
    if not any(p.requires_grad for a in attachments for p in a.parameters()):
        yield Concern("sites", "there are no trainable parameters; attach a method first", "error")
    for attachment in attachments:
        report = attachment.report()
        if report.inert:
            names = ", ".join(report.inert[:3])
            yield Concern("sites", f"{len(report.inert)} sites of {report.name} have no effect on this model, such as {names}")
        if report.uneven:
            yield Concern(
                "sites", f"{len(report.uneven)} blocks have no site for a role that {report.name} adapts in other blocks", "note"
            )


def learning_rates(
    attachments: Sequence[Attachment],
    config: TrainConfig,
    groups: Iterable[ParameterGroup] | None = None,
    default_rates: Mapping[str, float] | None = None,
) -> Iterator[Concern]:
    """Checks that learning rates are near their defaults.

    Args:
        groups: parameter groups of the optimizer, for their `lr_scale`; None if every group uses `config.learning_rate`.
        default_rates: method name to its default learning rate on this base model (default: the method's `learning_rate`).
    """
    if config.optimizer not in ADAPTIVE:
        return
    scales = {id(p): g.get("lr_scale", 1.0) for g in groups or () for p in g["params"]}
    for attachment in attachments:
        scale = min((scales.get(id(p), 1.0) for p in attachment.parameters()), default=1.0)
        rate, method = config.learning_rate * scale, attachment.method
        default = (default_rates or {}).get(method.name, method.learning_rate)
        if LOW <= rate / default <= HIGH:
            continue
        word, risk = ("above", "training may diverge or overfit") if rate > default else ("below", "training may have no effect")
        times = max(rate / default, default / rate)
        yield Concern(
            "learning rate",
            f"{rate:g} for {attachment.name} is {times:.0f} times {word} the default of {method.name}, {default:g}: {risk}",
        )


def steps(config: TrainConfig, photos: Sequence[Photo]) -> Iterator[Concern]:
    """Checks the number of steps per photo, and that the warm-up ends."""
    count = sum(not photo.is_prior for photo in photos)
    if config.warmup >= config.steps:
        yield Concern("steps", f"the warm-up of {config.warmup} steps does not end within {config.steps} steps; shorten it")
    if not count:
        return
    views, (few, many) = config.steps * config.samples / count, VIEWS
    repeats = f"{config.steps} steps of {config.samples} use each of {count} photos {views:.3g} times"
    if views < few:
        yield Concern("steps", f"{repeats}, which is too little training; expected {few} or more: increase the steps")
    elif views > many:
        yield Concern("steps", f"{repeats}; above {many} the model overfits to the photos: reduce the steps")


def images(photos: Sequence[Photo], resolution: int, concept: str) -> Iterator[Concern]:
    """Checks the number, size, duplicates and captions of the photos (see `photo_folder.photo_warnings`)."""
    own = [photo for photo in photos if not photo.is_prior]
    if not own:
        yield Concern("photos", f"there are no photos of the subject; expected a folder with {FEW_PHOTOS} or more", "error")
        return
    if len(own) < FEW_PHOTOS:
        yield Concern(
            "photos", f"only {len(own)}: background and pose will be learned with the subject; use {FEW_PHOTOS} or more"
        )
    small = [photo for photo in own if min(photo.size) < resolution]
    if small:
        names = ", ".join(f"{p.path.name} ({p.size[1]}×{p.size[0]})" for p in small[:5])
        most = resolution / min(min(photo.size) for photo in small)
        yield Concern(
            "photos",
            f"{len(small)} of {len(own)} are smaller than the resolution of {resolution} and will be enlarged up to {most:.1f} "
            f"times, so the model learns blur: {names}. Use larger photos, or a lower resolution.",
        )
    yield from (Concern("photos", str(text)) for text in photo_warnings(own, None, concept or None))


def findings(measured: Iterable[PhotoFinding]) -> Iterator[Concern]:
    """Warnings about single photos: blur, exposure, near duplicates, and what the crop keeps."""
    yield from (Concern("photos", str(finding), finding=finding) for finding in measured)


def side(resolution: int, family: Family) -> Iterator[Concern]:
    """Checks that the resolution is divisible and near the native one."""
    if resolution < 1 or resolution % family.multiple:
        near = max(1, round(resolution / family.multiple)) * family.multiple
        yield Concern("resolution", f"{resolution} is not divisible by {family.multiple}; use {near}", "error")
    elif not 0.5 <= resolution / family.resolution <= 2:
        yield Concern("resolution", f"{resolution} is far from the native resolution of the base model, {family.resolution}")


def concept_word(attachments: Sequence[Attachment], family: Family, concept: str, photos: Sequence[Photo]) -> Iterator[Concern]:
    """Checks the concept: missing, an existing token, a common word, or without a trained token."""
    if not concept.strip():
        if any(photo.caption is None and not photo.is_prior for photo in photos):
            yield Concern("concept", "it is missing, and some photos have no captions; set it, such as '<toy>'", "error")
        return
    learned = [s.tokenizer for a in attachments for s, _ in a.parts.values() if isinstance(s, VocabularySite) and s.tokenizer]
    for tokenizer in learned:
        added = _added_tokens(tokenizer)
        if not any(token in concept for token in added):
            names = ", ".join(repr(token) for token in added[:5])
            yield Concern(
                "concept", f"{concept!r} contains none of the new tokens, {names}, so they will not be trained", "error"
            )
            return
    tokenizers = [] if learned else [tokenizer for tokenizer, _ in family.limits()]
    yield from () if not tokenizers else _check_token(tokenizers[0], concept)


def _added_tokens(tokenizer: Any) -> list[str]:
    special = set(tokenizer.all_special_tokens)
    return [token for token in tokenizer.added_tokens_encoder if token not in special]


def _check_token(tokenizer: Any, concept: str) -> Iterator[Concern]:
    special = [token for token in tokenizer.all_special_tokens if token in concept]
    if special:
        yield Concern(
            "concept", f"{concept!r} contains {special[0]!r}, a special token of the tokenizer; choose another concept", "error"
        )
    elif concept in _added_tokens(tokenizer):
        yield Concern("concept", f"the tokenizer already has the token {concept!r}: its meaning will be overwritten")
    elif all(_is_common(tokenizer, word) for word in concept.split()):
        yield Concern(
            "concept",
            f"{concept!r} is a common word with a meaning in the base model, which changes in every prompt and is hard to "
            f"overcome. Choose a new token, such as '<{concept.split()[-1]}>'.",
        )


def _is_common(tokenizer: Any, word: str) -> bool:
    """Whether a word is a single token that is not among the rarest of a large vocabulary."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    ids = [i for i in ids if tokenizer.convert_ids_to_tokens(i) != "▁"]
    size = len(tokenizer)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id and (size < LARGE or ids[0] < RARE * size)


def prompts(family: Family, texts: Iterable[str]) -> Iterator[Concern]:
    """Checks prompts against token limits, and class labels of class-conditional models."""
    for text in dict.fromkeys(texts):
        for tokenizer, limit in family.limits():
            length = len(
                tokenizer(family.prepare([text], tokenizer), truncation=False, padding=False, verbose=False).input_ids[0]
            )
            if length > limit:
                what = f"{text!r} has {length} tokens, above the text encoder's limit of {limit}"
                error = family.truncate == "error"
                yield Concern(
                    "prompt", f"{what}: {'shorten it' if error else 'the rest will be cut off'}", "error" if error else "warning"
                )
                break
        if not family.text_towers:
            try:
                family.encode_text([text])
            except ValueError as error:
                yield Concern("prompt", str(error), "error")


def check_capacity(needs: Mapping[str, int], has: Mapping[str, int | None], certain: bool) -> Iterator[Concern]:
    """Checks memory and disk space.

    Args:
        needs, has: bytes of `memory` and `disk`; None if unknown.
        certain: whether too little memory is an error, as on a GPU; a CPU may swap. Too little disk space always is.
    """
    advice = {
        "memory": "lower the batch or resolution, or use gradient checkpointing",
        "disk": "free space, choose a folder on another disk (--out), or write fewer checkpoints (--checkpoint-every)",
    }
    for what, need in needs.items():
        free = has.get(what)
        if free is not None and need > free:
            severity: Literal["error", "warning"] = "error" if certain or what == "disk" else "warning"
            yield Concern(what, f"the run needs about {size(need)} and {size(free)} are free: {advice[what]}", severity)
