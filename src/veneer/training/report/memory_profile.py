"""Peak memory of a call from torch's allocation records, which are deterministic."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak(run: Callable[[], object]) -> int:
    """Peak bytes above those before the call, on a CUDA device if available, else on the CPU."""
    if torch.cuda.is_available():
        return _on_cuda(run)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silences the profiler's start and stop messages
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    with tempfile.TemporaryDirectory(prefix="veneer-memory-") as folder:
        file = Path(folder) / "record.json"
        record.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    return peak_of([int(e["args"]["Bytes"]) for e in sorted(events, key=lambda e: float(e["ts"]))])


def peak_of(changes: list[int]) -> int:
    """Maximum cumulative sum of the changes, at least 0."""
    allocated = highest = 0
    for change in changes:
        allocated += change
        highest = max(highest, allocated)
    return highest


def _on_cuda(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
