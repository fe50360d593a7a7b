"""Training loop of the three stages: seeded by step, resumable, with an EMA and atomic checkpoints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Writes to a temporary file, syncs and renames it, so that `path` is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


class Ema:
    """Exponential moving average of a module's parameters: ema <- decay * ema + (1 - decay) * parameter."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Updates the average; the decay is lower at first, so that the initial values have little weight."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = [(self.shadow[n], p) for n, p in module.state_dict().items() if p.is_floating_point()]
        shadows, values = [s for s, _ in pairs], [p for _, p in pairs]
        torch._foreach_lerp_(shadows, values, 1 - decay)


class TrainingRun:
    """A module with its optimizers, learning rate schedule, EMA, log and checkpoint."""

    def __init__(
        self,
        folder: Path,
        module: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        rate: Callable[[int], float],
        decay: float = 0.999,
    ) -> None:
        self.folder, self.module, self.optimizers, self.rate = folder, module, list(optimizers), rate
        self.ema = Ema(module, decay)
        self.step = 0
        self._base = [[group["lr"] for group in o.param_groups] for o in self.optimizers]

    @property
    def checkpoint(self) -> Path:
        """File of the training state."""
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Saves the state for `resume`."""
        optimizers = [o.state_dict() for o in self.optimizers]
        state = {"step": self.step, "model": self.module.state_dict(), "ema": self.ema.shadow, "optimizers": optimizers}
        write_atomic(self.checkpoint, lambda path: torch.save(state, path))

    def resume(self) -> bool:
        """Restores the checkpoint, if there is one."""
        if not self.checkpoint.is_file():
            return False
        state = torch.load(self.checkpoint, weights_only=True)
        self.step = state["step"]
        self.module.load_state_dict(state["model"])
        self.ema.shadow = state["ema"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return True

    def averaged(self) -> dict[str, Tensor]:
        """The EMA weights."""
        return {name: value.clone() for name, value in self.ema.shadow.items()}

    def log(self, **metrics: Any) -> None:
        """Appends a line to the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, "time": round(time.time()), **metrics}) + "\n")

    def train(
        self,
        loss: Callable[[int], Tensor],
        until: int,
        every: int = 200,
        report: Callable[[int], dict[str, Any]] | None = None,
        clip: float = 1.0,
    ) -> None:
        """Optimizes `loss(step)` up to step `until`; logs, reports and saves every `every` steps."""
        mean, began = 0.0, time.time()
        parameters = list(self.module.parameters())
        while self.step < until:
            factor = self.rate(self.step)
            for optimizer, base in zip(self.optimizers, self._base, strict=True):
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * factor
            value = loss(self.step)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self.ema.update(self.module, self.step)
            mean += value.item() / every
            if self.step % every == 0 or self.step == until:
                seconds = time.time() - began
                metrics = report(self.step) if report else {}
                self.log(loss=round(mean, 5), seconds=round(seconds, 1), rate=round(factor, 4), **metrics)
                self.save()
                mean, began = 0.0, time.time()


def cosine(total: int, warm: int = 100) -> Callable[[int], float]:
    """Linear warm-up over `warm` steps, then a cosine to zero at `total`."""
    import math

    return lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
