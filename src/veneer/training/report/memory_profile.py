"""The peak of memory in a call, from torch's own record of every block that it takes and gives back: the same each time."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak(run: Callable[[], object]) -> int:
    """Bytes above what was held before the call, at most: on a CUDA device if there is one, else on the CPU."""
    if torch.cuda.is_available():
        return _on_cuda(run)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler says on the terminal that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    with tempfile.TemporaryDirectory(prefix="veneer-memory-") as folder:
        file = Path(folder) / "record.json"
        record.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    return peak_of([int(e["args"]["Bytes"]) for e in sorted(events, key=lambda e: float(e["ts"]))])


def peak_of(changes: list[int]) -> int:
    """The highest sum of changes from the first on; 0 if it never rises."""
    held = highest = 0
    for change in changes:
        held += change
        highest = max(highest, held)
    return highest


def _on_cuda(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
