"""Trained parameters in the dtype of the files that a run writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from veneer.base_models.devices import Dtype
from veneer.injection import Attachment, SaveError


@contextlib.contextmanager
def rounded_to(attachments: Sequence[Attachment], dtype: Dtype) -> Iterator[None]:
    """Context in which parameters have values of `dtype` in their own dtype: images and metrics are then those of the files."""
    with _changed(attachments, lambda values: values.to(getattr(torch, dtype)).to(values.dtype)):
        yield


@contextlib.contextmanager
def cast_to(attachments: Sequence[Attachment], dtype: Dtype) -> Iterator[None]:
    """Context in which parameters are in `dtype`, for writing files.

    Raises:
        SaveError: a value is beyond the range of `dtype`.
    """
    largest = torch.finfo(getattr(torch, dtype)).max
    for name, parameter in ((a.name, p) for a in attachments for p in a.parameters() if p.is_floating_point()):
        if (values := parameter.detach().abs())[values.isfinite()].gt(largest).any():
            message = f"{name} has values above {largest:g}, the largest of {dtype}; expected --save-dtype bfloat16 or float32."
            raise SaveError(message, where=name, given=dtype, expected="bfloat16")
    with _changed(attachments, lambda values: values.to(getattr(torch, dtype))):
        yield


@contextlib.contextmanager
def _changed(attachments: Sequence[Attachment], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = [(p, p.data) for attachment in attachments for p in attachment.parameters() if p.is_floating_point()]
    try:
        for parameter, values in before:
            parameter.data = change(values)
        yield
    finally:
        for parameter, values in before:
            parameter.data = values
