"""Errors carry their data as attributes, through pickling and wrapping."""

from __future__ import annotations

import pickle

import pytest
import torch

from veneer.injection import errors
from veneer.injection.errors import LoadError, OptionError, UnsupportedSite, VeneerError

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, VeneerError)]


@pytest.mark.parametrize("cls", CLASSES)
def test_attributes_survive_pickling(cls: type[VeneerError]) -> None:
    error = cls("text", where="conv:down", given=(3,), expected=(8,), file="x.safetensors")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == "text"
    assert vars(again) == vars(error)
    assert (again.where, again.given, again.expected, again.file) == ("conv:down", (3,), (8,), "x.safetensors")


def test_attributes_of_a_class_survive_pickling() -> None:
    wrong = {"a": ((3,), (8,)), "b": (torch.int8, torch.float32)}
    error = pickle.loads(pickle.dumps(LoadError("text", missing=["m"], unused=["u"], misshapen=wrong, family="FLUX")))
    assert (error.missing, error.unused, error.misshapen, error.family) == (("m",), ("u",), wrong, "FLUX")


def test_an_error_from_another_takes_over_the_attributes_it_has() -> None:
    option = OptionError("rank: 0", option="rank", method="lora", given=0, expected="at least 1")
    site = UnsupportedSite.from_error(option, f"mlp: {option}", site="mlp", method="mine")
    assert str(site) == "mlp: rank: 0"
    assert (site.site, site.method, site.option, site.given, site.expected) == ("mlp", "mine", "rank", 0, "at least 1")
    loading = LoadError.from_error(site, f"x: {site}", file="x")
    assert (loading.file, loading.given, loading.missing) == ("x", 0, ())
    assert not hasattr(loading, "site")


def test_an_option_error_is_a_value_error() -> None:
    assert issubclass(OptionError, ValueError)
