"""Writes `docs/terminal.md`: what each job prints on a terminal, recorded in one new folder.

    python docs/scripts/record_terminal.py [--only NAME …] [--work FOLDER]

"Write captions" reads `dog`, a folder of photos, and `tagger`, as `docs/scripts/imagenet_tagger.py` writes it, from FOLDER.

A bar is shown as it stood at its end. The recorded text of a command is kept in the page until it is recorded again.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "terminal.md"
WIDTH = 120
INTRODUCTION = " ".join(
    [
        "---\nhide: [toc, navigation]\n---\n\n# What the commands print\n\nRecorded",
        f"on a terminal of {WIDTH} columns, on two CPU cores under other load, by",
        "`docs/scripts/record_terminal.py`. A bar is shown as it stood at its end. In a log, without a terminal, a line is",
        "printed every few seconds instead. `--quiet` prints errors only; `--json` prints the result as one JSON object on",
        "stdout, and all of this on stderr.",
    ]
)
JOBS: dict[str, tuple[str, ...]] = {
    "A subject from photos": (
        "veneer examples photos",
        "veneer personalize photos/octopus --concept '<octopus>' --class-word fish --out runs/octopus",
        "veneer generate 'a photo of a <octopus>' --adapter runs/octopus --out images",
    ),
    "Classify images": (
        "veneer transfer photos/digits --method lora --epochs 3 --out runs/classes",
        "veneer predict runs/classes photos/new",
        "veneer export runs/classes --to onnx --out digits.onnx",
    ),
    "Train several tasks": (
        "veneer transfer written=photos/digits scanned=digits --tasks --shots 20 --epochs 3 --out runs/tasks",
        "veneer predict runs/tasks photos/new --task written",
    ),
    "Analyze attention heads": (
        "veneer analyze heads runs/classes photos/digits --out runs/classes-heads",
        "veneer analyze heads bundled --prompts 'a photo of a blue car, white background' --timesteps 1 --out runs/bundled-heads",
    ),
    "Transfer a prompt": (
        "veneer transfer photos/digits --model bundled_clip --method prompt_tuning --tokens 4 --out runs/prompt",
        "veneer prompts spot runs/prompt --data digits --model bundled_clip --shots 20 --steps 20 --out runs/initial",
        "veneer prompts transfer runs/prompt --to bundled_clip --data digits --shots 20 --epochs 3 --out runs/moved",
    ),
    "Compare methods": ("veneer compare digits --methods 'bitfit, ssf' --epochs 1 --seeds 2 --out runs/compared",),
    "Search methods and sizes": (
        "veneer search photos/digits --methods 'lora, adaptformer' --sizes 1 4 --budget-parameters 20000 --supernet-epochs 10 "
        "--trials 8 --population 4 --epochs 15 --learning-rate 0.01 --out runs/search",
    ),
    "Write captions": ("veneer caption dog --model tagger --threshold 0.1 --prefix 'a photo of <dog>, '",),
    "Control the composition": (
        "veneer control train --method t2i_adapter --generated-images 64 --steps 60 --eval-seeds 1 --out runs/canny",
        "veneer control generate 'a blue car' --adapter runs/canny --image photos/octopus/01.png --out images",
    ),
    "Share an adapter": ("veneer push runs/octopus user/octopus-lora --license cc-by-4.0 --dry-run",),
    "Work with files": (
        "veneer inspect runs/octopus/adapter.safetensors",
        "veneer convert runs/octopus --to kohya --out octopus-kohya.safetensors",
        "veneer resize octopus-kohya.safetensors --rank 4 --base bundled --out octopus-rank4.safetensors",
    ),
}
"""Heading to the commands of a job, run one after the other in one folder."""


def main() -> None:
    """Records the jobs and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS), help="headings of the jobs to record")
    parser.add_argument("--work", type=Path, help="folder of the commands (default: a temporary one)")
    options = parser.parse_args()
    sections = _sections(PAGE.read_text("utf-8")) if PAGE.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for heading in options.only:
            blocks = [f"```text\n$ {command}\n{record(command, work)}\n```" for command in JOBS[heading]]
            sections[heading] = "\n\n".join(blocks)
            parts = [f"## {name}\n\n{sections[name]}" for name in JOBS if name in sections]
            PAGE.write_text("\n\n".join([INTRODUCTION.strip(), *parts]) + "\n", encoding="utf-8")


def record(command: str, folder: Path) -> str:
    """What a command shows on a terminal.

    Raises:
        CalledProcessError: the command failed; has its output.
    """
    words = [sys.executable, "-c", "from veneer_command import console; console()", *shlex.split(command)[1:]]
    environment = {**os.environ, "COLUMNS": str(WIDTH), "LINES": "40", "TERM": "xterm", "OMP_NUM_THREADS": "2"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe(words[0], words, environment)
    output = b"".join(iter(lambda: _read(terminal), b""))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = shown(output.decode("utf-8", "replace")).replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
    if status:
        raise subprocess.CalledProcessError(status, command, text)
    return text


def shown(output: str) -> str:
    """The lines of a terminal after all output: the last version of each rewritten line, without control sequences."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).replace("\r\n", "\n")
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in plain.split("\n")]
    return "\n".join(lines).strip("\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the command has ended
        return b""


def _sections(page: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)\n\n", page, flags=re.MULTILINE)[1:]
    return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}


if __name__ == "__main__":
    main()
