"""Outcome of one malformed file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.formats.malformed import of_bytes, of_claims, of_headers, of_json, of_pictures, of_tensors
from tests.formats.malformed.draft import MUTATIONS, Draft, Mutation
from tests.formats.malformed.good_files import Good, good_files
from tests.formats.malformed.good_guides import good_guides
from tests.formats.malformed.guide_meanings import OPTIONS
from tests.formats.malformed.meanings import Meaning, told
from tests.formats.malformed.models import model, small_host, towers
from veneer.formats import inspect, load_all
from veneer.formats._core.delta_comparison import _apply, _base_weight, _weight_adapters
from veneer.injection import Attachment, LoadError, attachments
from veneer.testing.snapshot import assert_same, snapshot

MADE_BY = (of_bytes, of_headers, of_tensors, of_claims, of_json, of_pictures)  # importing them fills MUTATIONS
SECONDS, MEGABYTES = 1.0, 200.0  # of the processor, for each load and each look; more than at its start, for all of them
HANGS = 20  # seconds of the clock, after which it is stopped
TOLERANCE = 1e-5  # of the largest number: what single precision loses
Pair = tuple[Good, Mutation]


class Hung(BaseException):
    """It was stopped by the time limit."""


class Wrong(Exception):
    """A wrong outcome."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of one file.

    Args:
        what: `refused`; `same` or `other` than the good file, as its bytes say; or `wrong`, and `why`.
        seconds: of the processor, for the longest load or inspection. `megabytes`: the peak above the start.
    """

    number: int
    good: str
    mutation: str
    what: str
    seconds: float
    megabytes: float
    why: str = ""


@dataclass
class Case:
    """One malformed file. `written`: where its files lie; `path`: what is loaded."""

    number: int
    good: Good
    mutation: Mutation
    written: Path
    path: Path
    seconds: float = 0.0

    @classmethod
    def of(cls, pair: Pair, number: int, seed: int, folder: Path) -> Case:
        """The file of an index; deterministic."""
        (good, mutation), rng = pair, Random(f"{seed}:{number}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files, name = dict(good.files), rng.choice(list(good.files))
        if mutation.kind in ("bytes", "picture"):
            files[name] = mutation.change(files[name], rng)
        elif mutation.kind != "path":
            draft = Draft.of(good)
            files = draft.files(good.main, mutation.change(draft, rng))
        for each, data in files.items():
            (folder / each).write_bytes(data)
        path = folder / good.main
        if mutation.kind == "path":
            place = mutation.change(folder / name, files[name], rng)
            path = place if name == good.main else path
        return cls(number, good, mutation, folder, path)

    def meaning(self) -> Meaning | None:
        """Reference reading of the bytes; None if they have no meaning."""
        places = [self.written / name for name in self.good.files]
        if any(os.path.lexists(place) and not place.is_file() for place in places):
            return None
        try:
            files = {place.name: place.read_bytes() for place in places if place.is_file()}
            return self.good.meaning(files, self.good.base)
        except Exception:
            return None

    def timed(self, call: Callable[..., Any], *args: Any) -> Any:
        began = time.process_time()
        try:
            return call(*args)
        finally:
            self.seconds = max(self.seconds, time.process_time() - began)


def check(case: Case) -> str:
    """Load and inspect it.

    Raises:
        Wrong: it is neither rejected with a clear error nor loaded as its bytes say, or changes the model.
    """
    before = {name: snapshot(tower) for name, tower in towers(case.good.model).items()}
    words = _words(case)
    got = _loaded(case)
    for name, tower in towers(case.good.model).items():
        assert_same(before[name], snapshot(tower), f"after a load: {name or 'model'}")
    if attachments(model(case.good.model)) or _words(case) != words:
        raise Wrong("something stays attached, or a token in the tokenizer")
    _look(case)
    if got is None:
        return "refused"
    want = case.meaning()
    if want is None:
        raise Wrong("loaded, and its bytes say nothing")
    if apart := difference(got, want):
        raise Wrong(f"loaded as something else than it says: {apart}")
    return "other" if difference(got, case.good.meaning(case.good.files, case.good.base)) else "same"


def _loaded(case: Case) -> Meaning | None:
    """The effect of a load, or None if it is rejected with a clear error."""
    try:
        made = case.timed(load_all, model(case.good.model), case.path)
    except LoadError as error:
        told = str(error)
        if case.mutation.loads:
            raise Wrong(f"it must load: {told[:300]}") from error
        named = case.mutation.kind == "path" or str(case.written) in told
        if not named or not 20 < len(told.replace(str(case.path), "")) < 5000:
            raise Wrong(f"an error that does not say enough, or too much: {told[:300]}") from error
        return None
    try:
        return effects(made)
    finally:
        for attachment in reversed(made):
            attachment.detach()


def _look(case: Case) -> None:
    """Inspect it, alone and for a model; the result is JSON, or the file is rejected as well."""
    for given in (None, model(case.good.model)):
        with contextlib.suppress(LoadError):
            seen = case.timed(inspect, case.path, given)
            if "NaN" in seen.to_json() or "Infinity" in seen.to_json() or not str(seen):
                json.loads(seen.to_json(), parse_constant=_refuse_constant)


def _refuse_constant(constant: str) -> None:
    raise Wrong(f"{constant} in JSON")


def _words(case: Case) -> Any:
    """The tokenizer's vocabulary and what veneer stores on it."""
    tokenizer = getattr(model(case.good.model), "components", {}).get("tokenizer")
    if tokenizer is None:
        return None
    notes = {key: value for key, value in vars(tokenizer).items() if "veneer" in key}
    return len(tokenizer), list(tokenizer.added_tokens_encoder), notes


def effects(made: Sequence[Attachment]) -> Meaning:
    """W' − W of every weight, and the values of everything else."""
    found: Meaning = {}
    for (component, path, param), parts in _weight_adapters(made).items():
        weight = _base_weight(*parts)
        found[f"{component}/{path}.{param}"] = (_apply(weight, parts) - weight).numpy()
    for attachment in made:
        plain = {name: adapter for name, (_, adapter) in attachment.parts.items() if not hasattr(adapter, "weight")}
        words = {f"{name}:{key}": t for name, adapter in plain.items() for key, t in adapter.state_dict().items()}
        each = getattr(attachment.method, "each", None)
        for key, tensor in [*words.items(), *attachment.trained.items()]:
            found[f"{' '.join(each)} {key}" if each else key] = tensor.detach().double().numpy()
        name, method = attachment.method.name, attachment.method
        found |= told(name, **{option: getattr(method, option) for option in OPTIONS.get(name, ())})
    return found


def difference(got: Meaning, want: Meaning) -> str:
    """Difference of two effects, empty if they are equal. Missing entries mean no change."""
    for key in dict.fromkeys([*got, *want]):
        a, b = got.get(key), want.get(key)
        a, b = np.zeros_like(b) if a is None else a, np.zeros_like(a) if b is None else b
        if a.shape != b.shape:
            return f"{key}: {a.shape} for {b.shape}"
        apart, size = np.abs(a - b).max(initial=0), max(np.abs(b).max(initial=0), 0.1)
        if not apart <= TOLERANCE * size:
            return f"{key}: {apart:.3g} of {size:.3g} apart"
    return ""


def judge(case: Case, slower: float = 1.0) -> Verdict:
    """`check` with a time limit and a memory limit. `slower`: how many times the limit of the processor's seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    first, why = memory("VmRSS"), ""
    handler = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(HANGS)
    try:
        what = check(case)
    except (Exception, Hung) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        cause = "" if isinstance(error, Wrong) else f" in {Path(where.filename).name}:{where.lineno}"
        what, why = "wrong", f"{type(error).__name__}: {str(error)[:300]}{cause}"
        for attachment in reversed(attachments(model(case.good.model))):
            with contextlib.suppress(Exception):
                attachment.detach()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    more = memory("VmHWM") - first
    if what != "wrong" and (case.seconds > SECONDS * slower or more > MEGABYTES):
        what, why = "wrong", f"{case.seconds:.1f} s of the processor, {more:.0f} MB"
    return Verdict(case.number, case.good.name, case.mutation.name, what, case.seconds, more, why)


def _stop(*_: Any) -> None:
    raise Hung


def memory(what: str) -> float:
    """Megabytes of this process: `VmRSS` now, `VmHWM` the most, `VmSize` of addresses."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


@contextlib.contextmanager
def ready(folder: Path, formats: Collection[str] = ()) -> Iterator[list[Pair]]:
    """Every good file, or those of some formats, with each applicable mutation. They load as their reference reading says."""
    as_it_is = Mutation("as it is", "bytes", lambda data, rng: data, loads=True)
    with small_host():
        made = [*good_files(folder / "good"), *good_guides(folder / "good")]
        files = [good for good in made if not formats or good.format in formats]
        for good in files:
            assert check(Case.of((good, as_it_is), 0, 0, folder / "run")) == "same", good.name
        yield [(good, mutation) for mutation in MUTATIONS for good in files if mutation.fits(good)]
