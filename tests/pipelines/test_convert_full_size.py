"""Commands on adapter files of a published architecture: what they import, and their memory at full size."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.pipelines.test_convert import published
from veneer import base_models
from veneer.injection.sites import WeightSite
from veneer.injection.towers import towers_of

RANK = 16
LIMIT = 500 * 2**20
"""Bytes. The file has 125 MiB, the fused one 200; torch itself needs about 220 MiB."""
CODE = """
import json, sys
from veneer.cli import main
linux = sys.platform == "linux"
for arguments in json.loads(sys.argv[1]):
    if linux:
        open("/proc/self/clear_refs", "w").write("5")  # resets the peak to what the process holds
    status = main(arguments)
    lines = open("/proc/self/status").read() if linux else ""
    peak = next((int(line.split()[1]) * 1024 for line in lines.split("\\n") if line.startswith("VmHWM")), 0)
    libraries = [m for m in ("diffusers", "transformers") if m in sys.modules]
    print("measured", json.dumps([status, peak, libraries]), file=sys.stderr)
"""


def run(*commands: list[str]) -> list[tuple[int, list[str]]]:
    """Peak of memory in bytes, and the libraries imported by its end, of each successful command of one process of their own."""
    done = subprocess.run([sys.executable, "-c", CODE, json.dumps(commands)], capture_output=True, text=True)
    lines = [line.removeprefix("measured ") for line in done.stderr.split("\n") if line.startswith("measured ")]
    statuses, *measured = zip(*map(json.loads, lines), strict=True)
    assert statuses == (0,) * len(commands), done.stderr
    return list(zip(*measured, strict=True))


def test_commands_on_files_import_neither_diffusers_nor_transformers(tmp_path: Path) -> None:
    path, _ = published("sdxl", tmp_path)
    commands = [
        ["convert", str(path), "--to", "kohya", "--out", str(tmp_path / "kohya")],
        ["inspect", str(path), "--base", "sdxl"],
        ["resize", str(path), "--rank", "2", "--out", str(tmp_path / "resized")],
        ["merge", str(path), str(path), "--out", str(tmp_path / "merged")],
    ]
    assert [(name, libraries) for (name, *_), (_, libraries) in zip(commands, run(*commands), strict=True) if libraries] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_conversion_holds_neither_file_as_a_whole(tmp_path: Path) -> None:
    """A LoRA on attention and feed-forward of FLUX.1, to fused layers and back."""
    tensors = {}
    for tower in towers_of(base_models.architecture("flux"))[:1]:
        for site in tower.sites:
            if isinstance(site, WeightSite) and site.role.startswith(("attn", "mlp", "single")):
                tensors[f"{site.name}.lora_A.weight"] = torch.randn(RANK, site.d_in).bfloat16()
                tensors[f"{site.name}.lora_B.weight"] = torch.randn(site.d_out, RANK).bfloat16()
    assert sum(t.nbytes for t in tensors.values()) > 120 * 2**20
    save_file(tensors, tmp_path / "lora.safetensors")
    files = ("lora", "kohya", "comfyui", "diffusers")
    commands = [
        ["convert", str(tmp_path / file), "--to", to, "--out", str(tmp_path / to)] for file, to in itertools.pairwise(files)
    ]
    for peak, libraries in run(*commands):
        assert libraries == []
        assert 0 < peak < LIMIT
