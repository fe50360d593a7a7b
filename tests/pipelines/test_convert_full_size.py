"""Commands on adapter files of a published architecture: what they import, and their memory at full size."""

from __future__ import annotations

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
import sys
from veneer.cli import main
status = main(sys.argv[1:])
lines = open("/proc/self/status").read() if sys.platform == "linux" else ""
peak = next((int(line.split()[1]) * 1024 for line in lines.split("\\n") if line.startswith("VmHWM")), 0)
print(status, peak, *[m for m in ("diffusers", "transformers") if m in sys.modules], file=sys.stderr)
"""


def run(*arguments: str) -> tuple[int, list[str]]:
    """Peak of memory in bytes, and the libraries that were imported, of a successful command in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True)
    status, peak, *libraries = done.stderr.split("\n")[-2].split()
    assert status == "0", done.stderr
    return int(peak), libraries


@pytest.mark.parametrize("command", ["convert", "inspect", "resize", "merge"])
def test_commands_on_files_import_neither_diffusers_nor_transformers(command: str, tmp_path: Path) -> None:
    path, _ = published("sdxl", tmp_path)
    more = {
        "convert": ["--to", "kohya", "--out", str(tmp_path / "out")], "inspect": ["--base", "sdxl"],
        "resize": ["--rank", "2", "--out", str(tmp_path / "out")], "merge": [str(path), "--out", str(tmp_path / "out")],
    }  # fmt: skip
    assert run(command, str(path), *more[command])[1] == []


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
    for file, to in (("lora", "kohya"), ("kohya", "comfyui"), ("comfyui", "diffusers")):
        peak, libraries = run("convert", str(tmp_path / file), "--to", to, "--out", str(tmp_path / to))
        assert libraries == []
        assert 0 < peak < LIMIT
        (tmp_path / f"{file}.safetensors").unlink()
