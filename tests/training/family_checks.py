"""Checks that the tests of several groups of training families share."""

from __future__ import annotations

from typing import Any

from tests.raising import raises
from veneer.injection.errors import BaseModelError
from veneer.training.families import families, family


def assert_missing_components_are_named(pipe: Any, name: str) -> None:
    """The family matches its pipeline, and without one of the components that it needs, an error names this one."""
    assert families()[name].matches(pipe)
    for part in family(pipe).needs:
        kept = getattr(pipe, part)
        setattr(pipe, part, None)
        try:
            with raises(BaseModelError, where="missing", given=(part,)):
                family(pipe)
        finally:
            setattr(pipe, part, kept)
