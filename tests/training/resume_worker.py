"""Real training processes that kill themselves where they are told to, for the tests of exact resume.

`python -m tests.training.resume_worker` reads one JSON `Job` a line and answers with the exit codes of its processes. Each
job runs in freshly forked processes, so that dozens of killed runs cost the import of torch once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it at their first step: once here, not in every job
from torch import Tensor, nn

from veneer.training.loop.seeds import generator
from veneer.training.loop.trainer import TrainConfig, Trainer

CONFIG: dict[str, Any] = {
    "steps": 40,
    "batch": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.02,
    "schedule": "cosine",
    "warmup": 5,
    "ema": 0.99,
    "seed": 3,
    "checkpoint_every": 4,
    "keep_checkpoints": 2,
    "tracker": "none",
}


@dataclass
class Job:
    """One run: where, how many processes, and when it dies.

    Args:
        after: event at which process `rank` sends itself `signal`; events are losses, syncs, renames and deletions.
        seconds: time after the start at which all processes are killed from outside.
        config: changes to `CONFIG`.
        dropout: of the model.
        model: `tiny`, `pipeline` or `quantized` for those of `kill_points`, `scheduled` or `selected` for those of the modules.
    """

    folder: str
    processes: int = 1
    rank: int = 0
    after: int | None = None
    signal: int = signal.SIGKILL
    seconds: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.2
    model: str = "tiny"


class Tiny(nn.Module):
    """Two layers with dropout, and a table of which each sample uses some rows."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.words = nn.Embedding(10, 6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        return self.down(self.dropout(torch.tanh(self.up(x + self.words(word)))))


def loss_of(model: Tiny, seed: int) -> Callable[[int, list[int]], Tensor]:
    """Predicts the noise in noisy points; all randomness comes from (seed, step, row)."""

    def loss_step(step: int, rows: list[int]) -> Tensor:
        draws = [generator(seed, "noise", step, row) for row in rows]
        clean = torch.stack([torch.randn(6, generator=draw) for draw in draws])
        noise = torch.stack([torch.randn(6, generator=draw) for draw in draws])
        word = torch.tensor([(step + row) % 10 for row in rows])
        return nn.functional.mse_loss(model(clean + noise, word), noise)

    return loss_step


def trainer_of(folder: Path | None, config: TrainConfig, dropout: float, watch: Callable[[], None] = lambda: None) -> Trainer:
    """The trainer of a job; `watch` is called before each loss."""
    torch.manual_seed(0)
    model = Tiny(dropout)
    loss_step = loss_of(model, config.seed)

    def watched(step: int, rows: list[int]) -> Tensor:
        watch()
        return loss_step(step, rows)

    groups = [
        {"params": [*model.up.parameters(), *model.down.parameters()], "name": "layers"},
        {"params": model.words.parameters(), "name": "words", "lr_scale": 0.5},
    ]
    return Trainer(config, groups, watched, dict(model.named_parameters()), folder)


def count_down(job: Job, rank: int) -> Callable[[], None]:
    """Count events, also those of the disk, and send the job's signal at its moment."""
    left = [job.after if job.after is not None and rank == job.rank else -1]

    def event() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), job.signal)

    for name in ("fsync", "rename", "rmdir"):
        original = getattr(os, name)
        setattr(os, name, lambda *args, _original=original, **kwargs: (event(), _original(*args, **kwargs))[1])
    return event


def train(job: Job, rank: int, port: int) -> None:
    """The life of one process of a job."""
    if job.processes > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(job.processes), RANK=str(rank), LOCAL_RANK=str(rank)
        )
        os.environ.update(ACCELERATE_USE_CPU="true", LOCAL_WORLD_SIZE=str(job.processes))
    event = count_down(job, rank)
    make = maker(job.model)
    trainer = make(Path(job.folder), TrainConfig(**{**CONFIG, **job.config}), job.dropout, event)
    trainer.fit(resume=True)
    if job.processes > 1:
        torch.distributed.destroy_process_group()


def maker(model: str) -> Callable[..., Trainer]:
    """Factory of the trainer of a job, with all imports done."""
    if model == "tiny":
        return trainer_of
    if model == "scheduled":
        from tests.training.scheduled import scheduled_trainer, tuned

        tuned()
        return scheduled_trainer
    if model == "selected":
        from tests.training.selected import selected_trainer

        return selected_trainer
    from tests.training.kill_points import pipeline_trainer, quantized_trainer, warm_up

    warm_up()
    return quantized_trainer if model == "quantized" else pipeline_trainer


def start(job: Job, rank: int, port: int) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(job, rank, port)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def kill(children: set[int]) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def run(job: Job, port: int) -> list[int]:
    """Run a job's processes to their end; once one was killed, the others are killed too. Gives their exit codes."""
    children = [start(job, rank, port) for rank in range(job.processes)]
    alive, codes = set(children), {}
    if job.seconds is not None:
        threading.Thread(target=lambda: (time.sleep(job.seconds), kill(set(alive))), daemon=True).start()
    while alive:
        child, status = os.waitpid(-1, 0)
        alive.discard(child)
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] == -signal.SIGKILL:
            kill(alive)
    return [codes[child] for child in children]


def main() -> None:
    for line in sys.stdin:
        port, job = json.loads(line)
        maker(job.get("model", "tiny"))  # imported here, before the forks
        print(json.dumps(run(Job(**job), port)), flush=True)


if __name__ == "__main__":
    main()
