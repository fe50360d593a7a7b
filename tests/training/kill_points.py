"""Exact resume on a real pipeline: a tiny Stable Diffusion with LoRA in its UNet and text encoder, killed at random moments.

`python -m tests.training.kill_points` kills 20 runs on one process and 20 on two, resumes each to its end, and compares every
byte of weights, optimizer and averaged weights, every loss, and for each loss the images, captions and state of torch's
generator with those of a run that was never killed. `--model quantized` quantizes the base model. `--cli personalize` does it
with `veneer personalize … --checkpoint-every 2 --resume` on one process, `--cli control` with `veneer control train …`; further
words are given to the command.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import veneer
from tests.training.images import save
from veneer.base_models import quantize_model
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.captions import Captions
from veneer.training.data.dataset import PhotoDataset
from veneer.training.data.photo_folder import find_photos
from veneer.training.families import family
from veneer.training.loop.trainer import TrainConfig, Trainer
from veneer.training.objective.denoising_loss import DenoisingLoss

CONFIG = {"steps": 10, "batch": 2, "gradient_accumulation_steps": 1, "learning_rate": 0.01, "checkpoint_every": 3}


@cache
def warm_up() -> None:
    """Import what a pipeline needs: once before the processes are forked, not in each."""
    pipe = tiny_pipeline("sd")
    family(pipe)
    veneer.attach(pipe, "lora")


def pipeline_trainer(
    folder: Path | None, config: TrainConfig, dropout: float, watch: Callable[[], None] = lambda: None, pipe: Any = None
) -> Trainer:
    """LoRA with dropout on the tiny pipeline, on three images with random crops, flips and dropped captions."""
    photos = find_photos(_photos(Path(tempfile.gettempdir()) / "veneer-kill-points"))
    pipe = tiny_pipeline("sd") if pipe is None else pipe
    torch.manual_seed(0)
    attached = [
        veneer.attach(pipe, "lora", rank=2, dropout=dropout, where=where, name=name)
        for name, where in (("image", "unet/*attn.{q,v}"), ("text", "text/attn.{q,v}"))
    ]
    for tower in {id(t): t for a in attached for t in a.towers.values()}.values():
        tower.train()
    captions = Captions("<toy>", dropout=0.2)
    dataset = PhotoDataset(photos, 32, 16, config.seed, captions=captions, flip=0.5, crop="random")
    loss = DenoisingLoss(family(pipe), dataset, config.seed, config.samples)

    def loss_step(step: int, rows: list[int]) -> Tensor:
        watch()
        if folder is not None:
            _trace(folder, step, rows, dataset.examples(step, config.samples, rows))
        return loss(step, rows)

    named = {f"{a.name}/{name}": p for a in attached for name, p in a.named_parameters()}
    groups = [
        {"params": list(a.parameters()), "name": a.name, "lr_scale": scale} for a, scale in zip(attached, (1, 0.5), strict=True)
    ]
    return Trainer(config, groups, loss_step, named, folder)


def quantized_trainer(
    folder: Path | None, config: TrainConfig, dropout: float, watch: Callable[[], None] = lambda: None
) -> Trainer:
    """The same on a pipeline whose UNet and text encoder are quantized, each by its own kind."""
    pipe = tiny_pipeline("sd", block_out_channels=(64, 64))
    for name, kind in (("unet", "nf4-dq"), ("text_encoder", "int8")):
        quantize_model(pipe.components[name], kind)
    return pipeline_trainer(folder, config, dropout, watch, pipe)


def _photos(folder: Path) -> Path:
    """Three images, the same for all processes; whoever comes first writes them."""
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            for seed, (width, height) in enumerate([(80, 64), (64, 80), (72, 72)]):
                save(Path(made) / "photos" / f"{seed}.png", width, height, seed)
            try:
                (Path(made) / "photos").rename(folder)
            except OSError:
                if not folder.exists():
                    raise
    return folder


def _trace(folder: Path, step: int, rows: list[int], examples: list[Any]) -> None:
    """One line per loss: examples, and the state of torch's generator."""
    random_state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    line = [step, rows, [[e.key, e.caption, e.index] for e in examples], random_state]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "trace.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def traced(folder: Path) -> set[str]:
    """The lines of all parts of a run, those of repeated steps once."""
    lines = (folder / "trace.jsonl").read_text().splitlines()
    return {line for line in lines if line.endswith('"]')}  # a kill may cut the last one of a part


def main(points: int, seed: int, steps: int, model: str) -> int:
    """Kill `points` runs on one process and as many on two. Gives the number that differ from a whole run."""
    from tests.training.resume_worker import Job
    from tests.training.test_resume import Worker, final

    wrong, ends = 0, {}
    config = {**CONFIG, "steps": steps}
    with tempfile.TemporaryDirectory() as scratch:
        worker = Worker(Path(scratch) / "stderr.txt")
        worker.run(Job(str(Path(scratch) / "warm"), model=model, config={**config, "steps": 1}))
        for processes in (1, 2):
            draw, whole = random.Random(seed + processes), Path(scratch) / f"whole-{processes}"
            began = time.monotonic()
            assert worker.run(Job(str(whole), processes, model=model, config=config)) == [0] * processes
            seconds = time.monotonic() - began
            expected, trace = final(whole, steps), traced(whole)
            ends[processes] = _weights(worker, Path(scratch) / f"plain-{processes}", processes, config, model)
            print(f"{processes} process(es): {steps} steps in {seconds:.1f} s, {len(trace)} losses")
            kills, tries = 0, 0
            while kills < points:
                tries += 1
                folder = Path(scratch) / f"{processes}-{tries}"
                moment = (
                    {"after": draw.randrange(1, 4 * steps), "rank": draw.randrange(processes)}
                    if tries % 2
                    else {"seconds": draw.uniform(0.05, 0.9) * seconds}
                )
                codes = worker.run(Job(str(folder), processes, model=model, config=config, **moment))
                had = sorted(path.name for path in folder.glob("checkpoint-*"))
                if -signal.SIGKILL not in codes:
                    print(f"      {moment}: had ended before, not counted")
                    continue
                kills += 1
                assert worker.run(Job(str(folder), processes, model=model, config=config)) == [0] * processes
                same = final(folder, steps) == expected and traced(folder) == trace
                wrong += not same
                newest = had[-1][-3:] if had else "none"
                verdict = "bitwise equal" if same else "DIFFERS"
                print(f"  {kills:2d}. {moment}: killed, newest checkpoint {newest}: {verdict}", flush=True)
        worker.close()
    apart = max((ends[1][name] - ends[2][name]).abs().max().item() for name in ends[1])
    print(f"without dropout, one and two processes differ by at most {apart:.2g} in the weights")
    print(f"{2 * points} kill points, {wrong} differ")
    return wrong


def _weights(worker: Any, folder: Path, processes: int, config: dict[str, Any], model: str) -> dict[str, Tensor]:
    """The end of a run without dropout, whose masks are random per process."""
    from tests.training.resume_worker import Job

    job = Job(str(folder), processes, model=model, config=config, dropout=0.0)
    assert worker.run(job) == [0] * processes
    return safetensors.torch.load_file(folder / f"checkpoint-{config['steps']:06d}" / "weights.safetensors")


COMMANDS = {
    "personalize": ["personalize", "{photos}", "--concept", "<toy>", "--method", "lora"],
    "control": ["control", "train", "{photos}", "--template", "a toy", "--eval-seeds", "0"],
}
"""What is killed, on three photos."""


def main_cli(command: str, points: int, seed: int, steps: int, extra: list[str]) -> int:
    """The same for a command: every tensor of its `adapter.safetensors` and last checkpoint."""
    wrong, draw = 0, random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        photos = _photos(Path(scratch) / "photos")

        def start(out: Path) -> subprocess.Popen[bytes]:
            words = [word.format(photos=photos) for word in COMMANDS[command]]
            words += ["--steps", str(steps), "--seed", "3", "--checkpoint-every", "2", "--resume", "--out", str(out), *extra]
            log = (Path(scratch) / "log.txt").open("ab")
            return subprocess.Popen(
                [sys.executable, "-c", "from veneer_command import console; console()", *words], stdout=log, stderr=log
            )

        def digest(out: Path) -> dict[str, str]:
            last = out / f"checkpoint-{steps:06d}"
            files = [out / "adapter.safetensors", *sorted(last.glob("*.safetensors"))]
            return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

        began, whole = time.monotonic(), Path(scratch) / "whole"
        assert start(whole).wait() == 0, (Path(scratch) / "log.txt").read_text()
        seconds = time.monotonic() - began
        print(f"veneer {command}: {steps} steps in {seconds:.1f} s")
        kills, tries = 0, 0
        while kills < points:
            tries += 1
            out, moment = Path(scratch) / str(tries), draw.uniform(0.3, 1.0) * seconds
            process = start(out)
            time.sleep(moment)
            process.kill()
            if process.wait() != -signal.SIGKILL:
                continue
            kills += 1
            had = sorted(path.name for path in out.glob("checkpoint-*"))
            assert (out / "result.json").exists() or start(out).wait() == 0, (Path(scratch) / "log.txt").read_text()
            same = digest(out) == digest(whole)
            wrong += not same
            newest = had[-1][-3:] if had else "none"
            verdict = "bitwise equal" if same else "DIFFERS"
            print(f"  {kills:2d}. after {moment:.1f} s: killed, newest checkpoint {newest}: {verdict}", flush=True)
    print(f"{points} kill points, {wrong} differ")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20, help="kills for each number of processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=CONFIG["steps"])
    parser.add_argument("--model", choices=("pipeline", "quantized"), default="pipeline", help="as in a job")
    parser.add_argument("--cli", choices=COMMANDS, help="a command to kill; further words are given to it")
    given, others = parser.parse_known_args()
    if given.cli:
        sys.exit(main_cli(given.cli, given.points, given.seed, given.steps, others) > 0)
    sys.exit(main(given.points, given.seed, given.steps, given.model) > 0)
