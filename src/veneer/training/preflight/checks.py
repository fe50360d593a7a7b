"""What looks wrong with a run before it starts: pure functions from its settings to `Concern`s."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from veneer.injection.sites import VocabularySite

from ..data.photo_folder import Photo
from ..data.photo_folder import concerns as folder_concerns
from ..loop.config import TrainConfig
from .estimates import size

if TYPE_CHECKING:
    from veneer.injection.attachment.attachment import Attachment

    from ..families import Family
    from ..loop.optimizers import Group

HIGH, LOW = 5.0, 1 / 20
"""A learning rate is far off above `HIGH` or below `LOW` times the method's own: too high destroys, too low only takes long."""
ADAPTIVE = ("adamw", "adamw8bit", "adafactor")
"""Optimisers for which the methods' own rates are meant."""
FEW_PHOTOS = 3
VIEWS = (10, 1500)
"""Times that each photo is seen: fewer teach little, more teach the photos by heart."""
RARE = 0.9
"""In a large vocabulary ids rank words by frequency, so a word in its last tenth is rare."""
LARGE = 30_000


@dataclass(frozen=True)
class Concern:
    """One thing that looks wrong.

    Args:
        about: `photos`, `concept`, `prompt`, `learning rate`, `steps`, `resolution`, `sites`, `memory` or `disk`.
        message: what was found and what to do.
        severity: `error` for what cannot work, `warning` for what probably is a mistake, `note` for what is good to know.
    """

    about: str
    message: str
    severity: Literal["error", "warning", "note"] = "warning"

    def __str__(self) -> str:
        return f"{self.severity}: {self.about}: {self.message}"


def sites(attachments: Sequence[Attachment]) -> Iterator[Concern]:
    """Nothing to train; sites without effect; blocks that lack what others have."""
    if not any(p.requires_grad for a in attachments for p in a.parameters()):
        yield Concern("sites", "nothing is attached that can be trained; attach a method first", "error")
    for attachment in attachments:
        report = attachment.report()
        if report.inert:
            names = ", ".join(report.inert[:3])
            yield Concern("sites", f"{len(report.inert)} sites of {report.name} have no effect on this host, such as {names}")
        if report.uneven:
            yield Concern("sites", f"{len(report.uneven)} blocks lack a role that {report.name} has in others", "note")


def learning_rates(
    attachments: Sequence[Attachment],
    config: TrainConfig,
    groups: Iterable[Group] | None = None,
    usual_rates: Mapping[str, float] | None = None,
) -> Iterator[Concern]:
    """Rates far from what is usual.

    Args:
        groups: the optimiser's, for their `lr_scale`; None if every group is trained at `config.learning_rate`.
        usual_rates: method name to the rate that is usual on this base; else the method's own `learning_rate` is.
    """
    if config.optimizer not in ADAPTIVE:
        return
    scales = {id(p): g.get("lr_scale", 1.0) for g in groups or () for p in g["params"]}
    for attachment in attachments:
        scale = min((scales.get(id(p), 1.0) for p in attachment.parameters()), default=1.0)
        rate, method = config.learning_rate * scale, attachment.method
        usual = (usual_rates or {}).get(method.name, method.learning_rate)
        if LOW <= rate / usual <= HIGH:
            continue
        word, risk = ("above", "it may diverge or forget") if rate > usual else ("below", "it may learn next to nothing")
        times = max(rate / usual, usual / rate)
        yield Concern(
            "learning rate",
            f"{rate:g} for {attachment.name} is {times:.0f} times {word} {method.name}'s usual {usual:g}: {risk}",
        )


def steps(config: TrainConfig, photos: Sequence[Photo]) -> Iterator[Concern]:
    """Too few or too many steps for these photos; a warm-up that never ends."""
    count = sum(not photo.is_prior for photo in photos)
    if config.warmup >= config.steps:
        yield Concern("steps", f"the warm-up of {config.warmup} does not end within {config.steps} steps; shorten it")
    if not count:
        return
    views, (few, many) = config.steps * config.samples / count, VIEWS
    seen = f"{config.steps} steps of {config.samples} show each of {count} photos {views:.3g} times"
    if views < few:
        yield Concern("steps", f"{seen}, which teaches little; expected {few} or more: give more steps")
    elif views > many:
        yield Concern("steps", f"{seen}; beyond {many} the photos are learnt by heart: give fewer steps")


def pictures(photos: Sequence[Photo], resolution: int, concept: str) -> Iterator[Concern]:
    """None, too few, too small; copies, and captions without the concept (see `folder.concerns`)."""
    own = [photo for photo in photos if not photo.is_prior]
    if not own:
        yield Concern("photos", "there are none of the subject; give a folder with 3 or more", "error")
        return
    if len(own) < FEW_PHOTOS:
        yield Concern(
            "photos", f"only {len(own)}: background and pose will be learnt with the subject; give {FEW_PHOTOS} or more"
        )
    small = [photo for photo in own if min(photo.size) < resolution]
    if small:
        names = ", ".join(f"{p.path.name} ({p.size[1]}×{p.size[0]})" for p in small[:5])
        most = resolution / min(min(photo.size) for photo in small)
        yield Concern(
            "photos",
            f"{len(small)} of {len(own)} are smaller than the resolution of {resolution} and will be enlarged up to {most:.1f} "
            f"times, which teaches blur: {names}. Give larger ones, or a lower resolution.",
        )
    yield from (Concern("photos", str(text)) for text in folder_concerns(own, None, concept or None))


def side(resolution: int, family: Family) -> Iterator[Concern]:
    """A resolution that does not divide, or is far from the base's own."""
    if resolution < 1 or resolution % family.multiple:
        near = max(1, round(resolution / family.multiple)) * family.multiple
        yield Concern("resolution", f"{resolution} does not divide by {family.multiple}, as this base needs; try {near}", "error")
    elif not 0.5 <= resolution / family.resolution <= 2:
        yield Concern("resolution", f"{resolution} is far from the {family.resolution} that the base was trained for")


def concept_word(attachments: Sequence[Attachment], family: Family, concept: str, photos: Sequence[Photo]) -> Iterator[Concern]:
    """A concept that is missing, that the tokenizer has already, that is a common word, or that no new token stands for."""
    if not concept.strip():
        if any(photo.caption is None and not photo.is_prior for photo in photos):
            yield Concern("concept", "there is none, and photos without captions; name it, such as '<toy>'", "error")
        return
    learned = [s.tokenizer for a in attachments for s, _ in a.parts.values() if isinstance(s, VocabularySite) and s.tokenizer]
    for tokenizer in learned:
        added = _added(tokenizer)
        if not any(token in concept for token in added):
            names = ", ".join(repr(token) for token in added[:5])
            yield Concern("concept", f"{concept!r} is none of the new tokens, {names}, so they will not be trained", "error")
            return
    tokenizers = [] if learned else [tokenizer for tokenizer, _ in family.limits()]
    yield from () if not tokenizers else _known(tokenizers[0], concept)


def _added(tokenizer: Any) -> list[str]:
    special = set(tokenizer.all_special_tokens)
    return [token for token in tokenizer.added_tokens_encoder if token not in special]


def _known(tokenizer: Any, concept: str) -> Iterator[Concern]:
    special = [token for token in tokenizer.all_special_tokens if token in concept]
    if special:
        yield Concern(
            "concept", f"{concept!r} holds {special[0]!r}, which is a mark of the tokenizer's own; choose another", "error"
        )
    elif concept in _added(tokenizer):
        yield Concern(
            "concept", f"the tokenizer already has the token {concept!r}: what the base knows by it will be overwritten"
        )
    elif all(_is_common(tokenizer, word) for word in concept.split()):
        yield Concern(
            "concept",
            f"{concept!r} is a common word that the base knows: it will change in every prompt, and the photos have to overcome "
            f"what it means. Choose a new one, such as '<{concept.split()[-1]}>'.",
        )


def _is_common(tokenizer: Any, word: str) -> bool:
    """Whether a word is a single token, and not one of the rarest of a large vocabulary."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    ids = [i for i in ids if tokenizer.convert_ids_to_tokens(i) != "▁"]
    size = len(tokenizer)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id and (size < LARGE or ids[0] < RARE * size)


def prompts(family: Family, texts: Iterable[str]) -> Iterator[Concern]:
    """Prompts longer than an encoder takes; labels that a class-conditional base does not have."""
    for text in dict.fromkeys(texts):
        for tokenizer, limit in family.limits():
            length = len(
                tokenizer(family.prepare([text], tokenizer), truncation=False, padding=False, verbose=False).input_ids[0]
            )
            if length > limit:
                what = f"{text!r} has {length} tokens and the text encoder takes {limit}"
                error = family.truncate == "error"
                yield Concern(
                    "prompt", f"{what}: {'shorten it' if error else 'the rest is cut off'}", "error" if error else "warning"
                )
                break
        if not family.text_towers:
            try:
                family.encode_text([text])
            except ValueError as error:
                yield Concern("prompt", str(error), "error")


def room(needs: Mapping[str, int], has: Mapping[str, int | None], certain: bool) -> Iterator[Concern]:
    """Memory or disk that does not suffice.

    Args:
        needs, has: bytes under `memory` and `disk`; None where unknown.
        certain: whether too little memory is an error: a GPU cannot go beyond it, a CPU may swap. Too little disk always is one.
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
