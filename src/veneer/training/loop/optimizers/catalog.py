"""Names of optimizers, and the class and default arguments of each.

A name is one of `BUILT_IN`, one of timm's factory (`timm.optim.list_optimizers`), or a path `package.module.Class`. Names of
`BUILT_IN` win over timm's. Case, `_` and `-` do not matter, so that kohya's `PagedAdamW8bit` is `paged_adamw8bit`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from veneer.injection.errors import MissingExtra, VeneerWarning

from ..errors import TrainError
from .modes import has_modes


class OptimizerWarning(VeneerWarning):
    """An option that has no effect with the optimizer of a run."""


@dataclass(frozen=True)
class Entry:
    """An optimizer class of a package, and the arguments that veneer passes to it.

    Args:
        module, attribute: of the class. extra: extra of veneer that installs the package; empty for torch.
    """

    module: str
    attribute: str
    extra: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def load(self, name: str) -> type[torch.optim.Optimizer]:
        """The class.

        Raises:
            MissingExtra: the package is not installed.
        """
        try:
            return getattr(importlib.import_module(self.module), self.attribute)
        except ImportError as error:
            raise missing_library(name, self.module.partition(".")[0], self.extra) from error


def missing_library(name: str, library: str, extra: str) -> MissingExtra:
    """The error for an optimizer whose library cannot be imported."""
    message = f"optimizer {name!r} needs {library}, which cannot be imported: pip install 'veneer[{extra}]'"
    return MissingExtra(message, where=name, given=library, expected=extra, library=library, extra=extra)


MOMENTUM = {"momentum": 0.9}
BITSANDBYTES = "bitsandbytes.optim"


def _eight_bit() -> dict[str, Entry]:
    """Optimizers of bitsandbytes with a state of 8 bits, or in paged memory."""
    entries: dict[str, Entry] = {}
    for name in ("Adam", "AdamW", "Lion", "AdEMAMix"):
        key = name.lower()
        variants = {f"{key}8bit": f"{name}8bit", f"paged_{key}": f"Paged{name}", f"paged_{key}8bit": f"Paged{name}8bit"}
        entries |= {variant: Entry(BITSANDBYTES, kind, "8bit") for variant, kind in variants.items()}
    for name in ("Adagrad", "RMSprop", "LAMB"):
        entries[f"{name.lower()}8bit"] = Entry(BITSANDBYTES, f"{name}8bit", "8bit")
    for name in ("SGD", "LARS"):
        entries[f"{name.lower()}8bit"] = Entry(BITSANDBYTES, f"{name}8bit", "8bit", MOMENTUM)
    return entries


BUILT_IN: dict[str, Entry] = {
    "adamw": Entry("torch.optim", "AdamW", defaults={"betas": (0.9, 0.999), "eps": 1e-8}),
    "sgd": Entry("torch.optim", "SGD", defaults=MOMENTUM),
    "adafactor": Entry("torch.optim", "Adafactor"),
    "prodigy": Entry(  # its default beta3 is sqrt(beta2)
        "prodigyopt", "Prodigy", "prodigy", {"betas": (0.9, 0.99), "use_bias_correction": True, "safeguard_warmup": True}
    ),
    "schedule_free_adamw": Entry("schedulefree", "AdamWScheduleFree", "optimizers"),
    "schedule_free_radam": Entry("schedulefree", "RAdamScheduleFree", "optimizers"),
    "schedule_free_sgd": Entry("schedulefree", "SGDScheduleFree", "optimizers"),
    "came": Entry("came_pytorch", "CAME", "optimizers"),
    "dadapt_adam": Entry("dadaptation", "DAdaptAdam", "optimizers"),
    "dadapt_adan": Entry("dadaptation", "DAdaptAdan", "optimizers"),
    "dadapt_lion": Entry("dadaptation", "DAdaptLion", "optimizers"),
    "dadapt_sgd": Entry("dadaptation", "DAdaptSGD", "optimizers"),
    **_eight_bit(),
}
"""Names with a class that veneer knows."""
ALIASES = {
    "adamwschedulefree": "schedule_free_adamw",
    "radamschedulefree": "schedule_free_radam",
    "sgdschedulefree": "schedule_free_sgd",
    "dadaptation": "dadapt_adam",
    "sgdnesterov": "nesterov",
}
"""Other names, of sd-scripts, without case and `_`."""
REJECTED = {
    "adahessian": "it needs second derivatives, which the training loop does not compute",
    "lbfgs": "it needs a closure that computes the loss several times in a step",
}
"""Names of optimizers that cannot train here, with the reason."""
EAGER = ("Kron",)
"""Classes that compile their step for each shape of a parameter, which takes a minute; they run without compilation."""
LIBRARIES = {"Kron": "opt_einsum"}
"""Libraries that a class needs for its products of many matrices, which take minutes and much memory in the default order."""


@functools.cache
def timm_names() -> tuple[str, ...]:
    """Names of timm's factory; empty if timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        return ()
    from timm.optim._optim_factory import list_optimizers

    return tuple(map(str, list_optimizers()))


def names() -> tuple[str, ...]:
    """All names that can be chosen, without those of `REJECTED`."""
    return (*BUILT_IN, *(name for name in timm_names() if name not in BUILT_IN and name not in REJECTED))


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def canonical_name(name: str) -> str:
    """The name in `names()` for a name that may differ in case, `_` and `-`; a path `package.module.Class` as it is.

    Raises:
        TrainError: an unknown name, or an optimizer that cannot train here.
    """
    if name in BUILT_IN:
        return name
    plain = _plain(name)
    plain = _plain(ALIASES.get(plain, plain))
    _reject(name, REJECTED.get(plain.rpartition(".")[2]))
    if "." in name:
        return name
    for known in _candidates(plain):
        return known
    close = difflib.get_close_matches(name.lower(), names(), 3, 0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names())}, or package.module.Class."
    missing = "" if timm_names() else " The optimizers of timm need its package: pip install 'veneer[timm]'."
    expected = tuple(close) or names()
    raise TrainError(f"no optimizer {name!r}; {hint}{missing}", where="optimizer", given=name, expected=expected)


def _candidates(plain: str) -> Iterable[str]:
    """Known names that are spelled like `plain`; timm is imported only if no built-in name is."""
    yield from (known for known in BUILT_IN if _plain(known) == plain)
    yield from (known for known in timm_names() if _plain(known) == plain)


def _reject(name: str, reason: str | None) -> None:
    if reason:
        message = f"optimizer {name!r} cannot be used: {reason}. Choose a first-order one, such as adamw."
        raise TrainError(message, where="optimizer", given=name, expected=reason)


def check_name(name: str) -> None:
    """Checks a name without importing the package of its class, except for names of timm.

    Raises:
        TrainError: an unknown name, or an optimizer that cannot train here.
    """
    canonical_name(name)


@functools.cache
def load_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of an optimizer.

    Raises:
        TrainError: an unknown name, a path without such a class, or one whose step needs a closure.
        MissingExtra: the package of a known class is not installed.
    """
    name = canonical_name(name)
    if name in BUILT_IN:
        cls = BUILT_IN[name].load(name)
    elif "." in name:
        cls = _class_at(name)
    else:
        from timm.optim._optim_factory import get_optimizer_class

        try:
            cls = get_optimizer_class(name, bind_defaults=False)  # type: ignore[assignment]
        except Exception as error:  # for its optional packages timm raises ImportError, AssertionError or ValueError
            raise TrainError(f"optimizer {name!r} is not available ({error})", where="optimizer", given=name) from error
    library = LIBRARIES.get(cls.__name__)
    if library is not None and importlib.util.find_spec(library) is None:
        raise missing_library(name, library, "optimizers")
    step = inspect.signature(cls.step).parameters.get("closure")
    _reject(name, REJECTED["lbfgs"] if step is not None and step.default is step.empty else None)
    return cls


def _class_at(path: str) -> type[torch.optim.Optimizer]:
    """The class at `package.module.Class`."""
    module, _, attribute = path.rpartition(".")
    expected = "the path of a torch.optim.Optimizer, package.module.Class"
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        message = f"optimizer {path!r}: {error}; expected {expected}, of an installed package."
        raise TrainError(message, where="optimizer", given=path, expected=expected) from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        message = f"optimizer {path!r} is not an optimizer class; expected {expected}."
        raise TrainError(message, where="optimizer", given=path, expected=expected)
    return cls


def is_learning_rate_free(name: str) -> bool:
    """True for Prodigy and D-Adaptation, which estimate the learning rate: their classes have an argument `d0`."""
    canonical = canonical_name(name)
    if canonical in BUILT_IN:
        return canonical.startswith(("prodigy", "dadapt_"))
    return "." in canonical and "d0" in inspect.signature(load_class(canonical)).parameters


def averages_weights(name: str) -> bool:
    """True for Schedule-Free optimizers, whose weights for evaluation are an average: the classes have `train` and `eval`."""
    canonical = canonical_name(name)
    return has_modes(load_class(canonical)) if "." in canonical else canonical.startswith("schedule_free_")
