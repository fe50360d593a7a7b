"""For all tests: tiers, seeds without a GPU, and a garbage collector that skips what imports and collection have created."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from tests.nightly import NIGHTLY, nightly
from veneer.testing.simulated_accelerator import register

if hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):  # torch from 2.10 on
    register()  # before the first backward pass
if not torch.cuda.is_available():  # its seed is kept for later, each time with the formatted stack of all calls
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = lambda seed: None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(5000, 20, 100)  # at Python's own thresholds, full collections take a sixth of the matrix's time
        gc.enable()


TIERS = {
    "nightly": tuple(path for path in NIGHTLY if "::" not in path),
    "matrix": ("matrix/",),
    "browser": ("apps/test_browser", "apps/test_clients.py"),
    "slow": (
        "apps/", "base_models/", "benchmarks/", "captioning/", "pipelines/", "test_allocator.py", "test_example_package.py",
        "test_extras.py", "test_docs.py", "test_readme.py", "classification/test_comparison.py", "classification/test_export",
        "hosts/", "hub/test_card.py", "hub/test_push", "classification/test_base_to_new.py",
        "classification/test_multi_label.py", "classification/test_protocols.py", "classification/test_successive_halving.py",
        "classification/test_transformers_loading.py", "control/test_maps.py", "training/flow_families/",
        "training/language_model_families/", "training/transformer_families/", "training/video_families/",
        "training/recent_families/test_sequence", "injection/test_accelerator.py", "injection/test_activation.py",
        "injection/test_layer_order.py", "injection/test_quantized_weights.py", "injection/test_swap.py",
        "methods/test_chain.py", "methods/test_control", "methods/test_lora_inits.py", "methods/test_output_rotation.py",
        "training/test_preflight.py", "training/test_families.py", "training/test_memory", "training/test_resume.py",
        "training/test_scheduled.py", "training/test_sharded_base.py", "training/test_initial_adapter.py",
        "training/test_optimizer_names.py", "training/test_option_conflicts.py", "training/test_param_groups.py",
        "training/test_previews.py", "training/test_selected.py", "test_families_page.py", "test_method_search.py",
        "hub/test_download.py", "injection/test_ordering_stacks.py", "methods/test_ip_adapter.py", "formats/",
        "training/recent_families/", "methods/test_p_plus.py", "injection/test_mixed_batch_rows.py",
        "classification/test_few_shot.py", "test_config_file.py", "adapter_merging/test_combine.py", "classification/search/",
    ),
}  # fmt: skip
"""Marker to the beginnings of paths below `tests`, beside tests that have the marker themselves."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skips the files of tiers that `-m "not TIER and …"` excludes, whose imports take seconds."""
    expression = config.option.markexpr
    excluded = set() if " or " in expression else {*re.findall(r"\bnot (\w+)", expression)}
    beginnings = tuple(beginning for tier in TIERS.keys() & excluded for beginning in TIERS[tier])
    if str(collection_path) in (str(Path(word.split("::")[0]).absolute()) for word in config.args):
        return None
    path = collection_path.relative_to(Path(__file__).parent).as_posix() + "/" * collection_path.is_dir()
    return path.startswith(beginnings) or None


LONG = (
    ("apps/test_browser_pages.py", "test_docs.py", "test_readme.py", "pipelines/"),
    (
        "apps/test_browser_trouble.py",
        "apps/test_jobs.py",
        "apps/test_p",
        "training/test_sharded_base.py",
        "benchmarks/",
        "training/",
    ),
    ("apps/test_browser", "apps/test_clients.py", "test_example_package.py", "apps/"),
)
"""Beginnings of paths of files with fixtures and tests that take the longest, in groups: each group runs first in a process.

Tests in a browser wait for a server, its jobs and pages: in one process they would take longer than all other tests.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds the marker of its tier to each test, and moves the longest to the fronts of the processes.

    A process begins with an equal part of the list, and then takes tests from the end of that of another one: a long test at the
    end would run alone, tests that wait leave a core unused if they run together, and a file that is divided has its fixtures
    twice.
    """
    root = Path(__file__).parent
    places = list[tuple[int, int]]()
    for item in items:
        path = item.path.relative_to(root).as_posix()
        for tier, beginnings in TIERS.items():
            if path.startswith(beginnings):
                item.add_marker(tier)
        places.append(_place(path))
    for item, late in zip(items, nightly([item.nodeid.removeprefix("tests/") for item in items]), strict=True):
        if late:
            item.add_marker("nightly")
    order = sorted(range(len(items)), key=lambda index: places[index])
    groups = [[items[index] for index in order if places[index][0] == group] for group in range(len(LONG) + 1)]
    items[:] = in_parts(groups[:-1], groups[-1], int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


def _place(path: str) -> tuple[int, int]:
    """Group of a file, and its place in the group."""
    found = ((group, place) for group, files in enumerate(LONG) for place, file in enumerate(files) if path.startswith(file))
    return next(found, (len(LONG), 0))


def in_parts(groups: Sequence[Sequence[Any]], others: Sequence[Any], parts: int) -> list[Any]:
    """One list of `parts` nearly equal parts, which begin with the groups in turn; a longer group goes on in the next part."""
    fronts = [[item for group in groups[part::parts] for item in group] for part in range(parts)]
    left, rest, ordered = sum(map(len, fronts)) + len(others), list(others), list[Any]()
    for part, front in enumerate(fronts):
        size = max(left // (parts - part) - len(front), 0)
        ordered += [*front, *rest[:size]]
        rest, left = rest[size:], left - len(front) - min(size, len(rest))
    return ordered + rest
