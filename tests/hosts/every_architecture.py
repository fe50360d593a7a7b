"""Every architecture that timm and open_clip name and a host matches, on the meta device, accepts every method or gives a reason.

`python -m tests.hosts.every_architecture` runs all of them and writes docs/results/architectures.md. Finished
architectures are kept in a file of JSON lines, and are skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

import veneer
from veneer.hosts import timm_conv, timm_swin, timm_vit
from veneer.injection import towers
from veneer.injection.attachment.plan import supports
from veneer.injection.errors import VeneerError
from veneer.injection.registry import host_of
from veneer.injection.sites import PixelSite, Site
from veneer.injection.towers import Tower, towers_of

LIBRARIES = {
    "timm": ("timm_vit", "timm_swin", "timm_convnext", "timm_conv"),  # timm_fallback: `timm_coverage`
    "open_clip": ("open_clip", "clip_classifier"),
}
FAMILIES = {*timm_vit.FAMILIES, *timm_swin.FAMILIES, *timm_conv.FAMILIES, "timm.models.convnext.ConvNeXt"}
CLASSES = ("cat", "dog", "red car")
HUGGING = "its text tower is one of transformers, whose configuration would have to be downloaded"
TOKENIZER = "its tokenizer would have to be downloaded, so that it is no classifier here"


Known = dict[str, dict[str, Any]]


@dataclass
class Outcome:
    """Outcome of one architecture.

    Args:
        name: `timm/…` or `open_clip/…`. `host`: of the model; empty where none matches.
        skipped: why it was not built, or what else was skipped.
        seconds: to build it, attach all methods and detach them. `sites`: number of sites of the host.
        tried: methods that were attached here, and not on an architecture with the same sites for them. `keys`: of those sites.
        methods: of each `{"sites", "trained"}`, `{"refused": message}`, or `{"bug": message}` for any other error.
    """

    name: str
    host: str = ""
    skipped: str = ""
    seconds: float = 0.0
    sites: int = 0
    tried: int = 0
    keys: dict[str, str] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)


def names() -> list[str]:
    """Of all architectures, library in front, in an order that mixes families, so that a stopped run contains some of each.

    Those of timm are of modules that import a class that a host matches.
    """
    import open_clip
    import timm
    from timm.models._registry import _model_to_module

    able = {module for module in set(_model_to_module.values()) if knows_a_family(f"timm.models.{module}")}
    clips = dict.fromkeys([*open_clip.list_models(), *open_clip.list_openai_models()])
    found = [f"timm/{name}" for name in timm.list_models() if _model_to_module[name] in able]
    found += [f"open_clip/{name}" for name in clips]
    return sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())


def knows_a_family(module: str) -> bool:
    """True if a class of a module is one that a host of timm matches, or is derived from one."""
    classes = [c for c in vars(import_module(module)).values() if inspect.isclass(c)]
    families = {f"{c.__module__}.{c.__qualname__}" for cls in classes for c in cls.__mro__}
    return not families.isdisjoint(FAMILIES)


def outcomes(name: str, methods: Sequence[str], families: Sequence[str], known: Known | None = None) -> Iterator[Outcome]:
    """Build an architecture, and try each method on it; a CLIP bare, and as a classifier.

    Args:
        known: outcome of a method on given sites, by its key; new outcomes are added.
    """
    library, _, short = name.partition("/")
    try:
        subjects = list((_timm if library == "timm" else _open_clip)(short))
    except Exception as error:  # every library has its own ways not to build
        yield Outcome(name, skipped=f"not built on meta: {type(error).__name__}: {error}")
        return
    for model, skipped in subjects:
        start = time.perf_counter()
        host = host_of(model) if model is not None else None
        outcome = Outcome(name, host.name if host else "", skipped)
        if model is not None and outcome.host in families:
            try_methods(model, outcome, methods, known)
            outcome.seconds = round(time.perf_counter() - start, 2)
        yield outcome


def _timm(name: str) -> Iterator[tuple[nn.Module | None, str]]:
    import timm

    with torch.device("meta"):
        yield timm.create_model(name, pretrained=False), ""


def _open_clip(name: str) -> Iterator[tuple[nn.Module | None, str]]:
    import open_clip

    from veneer.models.clip_classifier import CLIPClassifier

    text = open_clip.get_model_config(name)["text_cfg"]
    if "hf_model_name" in text:
        yield None, HUGGING
        return
    with torch.device("meta"):
        clip = open_clip.create_model(name, device="meta", load_weights=False, pretrained_image=False, pretrained_text=False)
    yield clip, ""
    if "hf_tokenizer_name" in text:
        yield None, TOKENIZER
    else:
        yield CLIPClassifier(clip, open_clip.get_tokenizer(name), CLASSES), ""


def try_methods(model: nn.Module, outcome: Outcome, methods: Sequence[str], known: Known | None = None) -> None:
    """Attach each method with its default selection, count its parameters, and detach it; nothing may remain."""
    known = {} if known is None else known
    found = towers_of(model)
    try:
        places = [(site, _words(model, site)) for tower in found for site in tower.sites]
    except Exception as error:  # a host that fails fails every method
        outcome.methods = {method: {"bug": f"{type(error).__name__}: {error}"} for method in methods}
        return
    outcome.sites, bare = len(places), traces(model)
    for method in methods:
        key = key_of(method, outcome.host, places)
        if key not in known:
            outcome.tried += 1
            result = _try(model, method, found)
            if (after := traces(model)) != bare:
                result, bare = {"bug": f"detach left {sorted(after ^ bare)[:3]} changed"}, after
            if not key:
                outcome.methods[method] = result
                continue
            known[key] = result
        outcome.keys[method], outcome.methods[method] = key, known[key]


def key_of(method: str, host: str, places: Iterable[tuple[Site, str]]) -> str:
    """A digest of all that attaching a method without values depends on: the sites that it can use. Empty if there are none."""
    cls = veneer.methods.get(method)
    words = [text for site, text in places if supports(cls, site)]
    return hashlib.sha256("\n".join([method, host, *words]).encode()).hexdigest()[:16] if words else ""


def _words(model: nn.Module, site: Site) -> str:
    """A site and its module, without what adapters do not depend on: the normalization of images, the positions of patches."""
    plain: Site = replace(site, mean=(), std=()) if isinstance(site, PixelSite) else site
    path = getattr(site, "path", "")
    text = re.sub(r" at 0x[0-9a-f]+|(?<=grid=)\(\d+, \d+\)", "", repr(plain))
    return f"{text} {type(model.get_submodule(path)).__qualname__}"


def _try(model: nn.Module, method: str, found: list[Tower]) -> dict[str, Any]:
    token = towers._CACHE.set({id(model): found})  # a bare model has the same sites each time
    try:
        tuned = veneer.attach(model, method)
    except VeneerError as error:
        return {"refused": str(error)}
    except Exception as error:  # anything else is a bug, which is what is looked for
        return {"bug": f"{type(error).__name__}: {error}"}
    finally:
        towers._CACHE.reset(token)
    trained = {id(p): p.numel() for p in tuned.parameters()}
    taken = {"sites": len(tuned.parts), "trained": sum(trained.values())}
    tuned.detach()
    return taken


def traces(model: nn.Module) -> set[tuple[str, str, int]]:
    """Names of all modules, parameters and buffers, with their types and how many hooks are on them."""
    found = set()
    for name, module in model.named_modules(remove_duplicate=False):
        found.add((name, type(module).__qualname__, len(module._forward_hooks) + len(module._forward_pre_hooks)))
        for param, tensor in (*module._parameters.items(), *module._buffers.items()):
            found.add((f"{name}.{param}", type(tensor).__name__, id(tensor)))
    return found


def run(
    records: Path,
    families: Sequence[str],
    methods: Sequence[str],
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Every architecture that is not in `records` yet is tried and added there. Gives all that are asked for."""
    records.parent.mkdir(parents=True, exist_ok=True)
    done = read(records)
    wanted = [n for n in names() if not set(LIBRARIES[n.partition("/")[0]]).isdisjoint(families)]
    open_ones = {o.name for o in done if o.host in families and not set(methods) <= o.methods.keys()}
    finished = {o.name for o in done} - open_ones
    known = {key: o.methods[method] for o in done for method, key in o.keys.items()}
    with records.open("a") as file:
        file.truncate(_whole(records))
        for i, name in enumerate(wanted):
            if name in finished:
                continue
            found = list(outcomes(name, methods, families, known))
            file.write("".join(json.dumps(asdict(o)) + "\n" for o in found))
            file.flush()
            done.extend(found)
            say(f"{i + 1}/{len(wanted)} {name} {sum(o.seconds for o in found):.1f} s, {sum(o.tried for o in found)} tried")
    last = {(o.name, o.host, o.skipped): o for o in done}
    return [o for o in last.values() if o.name in set(wanted)]


def read(records: Path) -> list[Outcome]:
    """Finished architectures. An incomplete last line is skipped."""
    whole = records.read_bytes()[: _whole(records)] if records.is_file() else b""
    return [Outcome(**json.loads(line)) for line in whole.splitlines()]


def _whole(records: Path) -> int:
    """Where the last whole line ends."""
    return records.read_bytes().rfind(b"\n") + 1


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    every = [host for hosts in LIBRARIES.values() for host in hosts]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(every), help="hosts, with commas")
    parser.add_argument("--methods", default=",".join(veneer.methods.names()), help="with commas")
    parser.add_argument("--records", type=Path, default=Path("runs/architectures.jsonl"), help="what is finished, kept here")
    parser.add_argument("--out", type=Path, default=Path("docs/results/architectures.md"))
    given = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = run(given.records, given.families.split(","), given.methods.split(","), partial(print, flush=True))
    from tests.hosts.architectures_page import page

    given.out.write_text(page(found))


if __name__ == "__main__":
    main()
