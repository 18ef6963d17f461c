"""The trainer with real processes: two share a batch, one is killed, and the time is kept."""
from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from recsys.ops import launch
from recsys.prep.sequences import Sequences
from recsys.training import checkpoints, trainer
from recsys.training.cluster import shared
from recsys.training.pace import Options, Result, TrainingError
from recsys.training.trainer import train

ITEMS = 24
HERE = Path(__file__)


def strides(rows: int, seed: int = 0) -> Sequences:
    "The next item is the one before plus a stride of the sequence's own: two items tell the third."
    rng = np.random.default_rng(seed)
    starts, steps, lengths = rng.integers(0, ITEMS, rows), rng.integers(1, 4, rows), rng.integers(4, 20, rows)
    return Sequences.from_lists([1 + (s + d * np.arange(n)) % ITEMS for s, d, n in zip(starts, steps, lengths, strict=True)])


class Strides:
    undecayed = ()

    def __init__(self, sequences: Sequences, *, size: int = 61, dropout: float = 0.0, negatives: int = 0, wait: float = 0.0) -> None:
        torch.manual_seed(0)
        self.sequences, self.size, self.negatives, self.wait = sequences, size, negatives, wait
        self.module = nn.Sequential(nn.Embedding(ITEMS + 1, 16), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, ITEMS + 1))

    def plan(self, epoch: int) -> list[np.ndarray]:
        order = np.random.default_rng((7, epoch)).permutation(len(self.sequences))
        return [order[i:i + self.size] for i in range(0, len(order), self.size)]

    def targets(self, rows: np.ndarray) -> int: return int((self.sequences.lengths[rows] - 2).sum())

    def batch(self, rows: np.ndarray, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [self.sequences[int(row)].astype(np.int64) for row in rows]
        pairs = np.concatenate([np.stack([p[:-2], p[1:-1]], 1) for p in parts])
        return torch.from_numpy(pairs), torch.from_numpy(np.concatenate([p[2:] for p in parts]))

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor], step: int) -> torch.Tensor:
        if self.wait: time.sleep(self.wait)
        logits = self.module(batch[0])
        if self.negatives:  # shared by the batch, keyed by step: the same for each process
            drawn = np.random.default_rng((3, step)).choice(ITEMS + 1, self.negatives, replace=False)
            keep = torch.zeros(len(logits), ITEMS + 1, dtype=torch.bool)
            keep[:, drawn] = True
            logits = logits.masked_fill(~keep.scatter(1, batch[1][:, None], True), -1e9)
        return nn.functional.cross_entropy(logits, batch[1], reduction="sum")


def work(*, folder: str, wait: float = 0.0, pids: str | None = None, rows: int = 1000, size: int = 61, negatives: int = 0, dropout: float = 0.0, **options) -> dict:
    "What each process calls."
    if pids: (Path(pids) / f"{os.environ.get('RANK', 0)}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}").write_text(str(os.getpid()))
    arrays = shared(lambda: {"values": strides(rows).values, "offsets": strides(rows).offsets}, name="sequences", folder=folder)
    task = Strides(Sequences(arrays["values"], arrays["offsets"]), size=size, negatives=negatives, wait=wait, dropout=dropout)
    result = train(task, Options(lr=1e-2, device="cpu", dtype="fp32", **options), folder=Path(folder) / "checkpoints", validate=lambda: -1.0)
    mapped = isinstance(arrays["values"].base, np.memmap) or isinstance(arrays["values"], np.memmap)
    return {"losses": [p.loss for p in result.curve], "steps": result.steps, "world": result.world, "mapped": mapped, "seconds": result.seconds, "cpu": result.cpu_seconds,
            "data": result.data_share, "norm": float(sum(p.detach().double().square().sum() for p in task.module.parameters()))}


def launched(folder: Path, nproc: int, **arguments) -> dict:
    return launch.run(f"{HERE.stem}:work", {**arguments, "folder": str(folder)}, folder=folder, nproc=nproc, path=[HERE.parent])


def test_one_and_two_processes_have_one_loss(tmp_path: Path):
    "The last batch has one row: a process is without."
    one = work(folder=str(tmp_path / "one"), epochs=3, rows=977, negatives=8)
    two = launched(tmp_path / "two", 2, epochs=3, rows=977, negatives=8)
    assert (one["world"], two["world"]) == (1, 2) and two["mapped"]
    assert one["steps"] == two["steps"] == 51 and np.allclose(one["losses"], two["losses"], rtol=0, atol=1e-4)
    assert one["losses"][-1] < 0.6 * one["losses"][0] and abs(one["norm"] - two["norm"]) < 1e-2


@pytest.mark.long  # two trainings and two restarts of torchrun: minutes on a busy machine
def test_killed_in_an_epoch_and_restarted_it_ends_as_if_nothing_had_been(tmp_path: Path):
    calm = launched(tmp_path / "calm", 2, epochs=3, dropout=0.1)
    pids, folder = tmp_path / "pids", tmp_path / "killed"
    pids.mkdir()
    arguments = {"epochs": 3, "dropout": 0.1, "wait": 0.05, "pids": str(pids), "checkpoint_seconds": 0.1, "folder": str(folder)}
    job = launch.prepare(f"{HERE.stem}:work", arguments, folder=folder)
    running = subprocess.Popen(launch.command(job, nproc=2), env=launch.environment([HERE.parent]))
    until = time.monotonic() + 240
    while not ((found := checkpoints.latest(folder / "checkpoints")) and 20 < found.step < 34) and time.monotonic() < until: time.sleep(0.02)
    assert found, "no checkpoint"
    os.kill(int((pids / "1-0").read_text()), signal.SIGKILL)
    assert running.wait(240) == 0
    result = launch.result(job)
    assert (pids / "0-1").exists(), "torchrun started both again"
    assert result["steps"] == calm["steps"] and result["losses"] == calm["losses"] and result["norm"] == calm["norm"]  # bit for bit
    alone = tmp_path / "alone" / "checkpoints"  # what two began, one can end
    checkpoints.write(alone, found.step, found.tensors, found.state)
    ended = work(folder=str(alone.parent), epochs=3, dropout=0.1)
    assert ended["steps"] == calm["steps"] and abs(ended["losses"][-1] - calm["losses"][-1]) < 0.1


def test_an_error_that_would_come_again_ends_the_job(tmp_path: Path):
    with pytest.raises(launch.LaunchError, match="ema = 2 is out of range"): launched(tmp_path, 2, ema=2)


def fitted(tmp_path: Path | None = None, *, wait: Callable[[float], object] = lambda seconds: None, **options) -> Result:
    class Waits(Strides):
        "A hundredth of a second goes by in each step."
        def loss(self, batch: tuple[torch.Tensor, torch.Tensor], step: int) -> torch.Tensor: return wait(0.01) or super().loss(batch, step)
    return train(Waits(strides(3000)), Options(lr=1e-2, device="cpu", dtype="fp32", **options), folder=tmp_path, validate=lambda: wait(0.1) or 1.0)


def test_the_minutes_are_kept(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(trainer, "now", lambda clock: now[0])
    result = fitted(epochs=1000, minutes=0.1, wait=lambda seconds: now.append(now.pop() + seconds))
    assert 5.4 < result.seconds < 6.6 and result.stopped == "minutes" and result.curve[-1].lr < 0.1 * 1e-2


def walks(users: int, steps: int) -> pl.DataFrame:
    rows = [(f"u{u}", f"i{(u + d * n) % 200:03}", "view", n) for u in range(users) for d in (1 + u % 3,) for n in range(steps)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "type", "ts"], orient="row")


def test_data_are_a_small_part_of_a_step(monkeypatch: pytest.MonkeyPatch):
    "Of the real network's, in batches of its usual size, in time of the processor."
    from recsys.models import sequential
    monkeypatch.setattr(trainer, "now", lambda clock: time.process_time())
    model = sequential.fit(walks(400, 60), asof=1000, epochs=1, dim=64, device="cpu", dtype="fp32")
    assert model.training and model.training.steps >= 8 and model.training.data_share < 0.05


def network(*, folder: str) -> dict:
    "The real one; each process notes down what it made by itself, and whether what it learned from is mapped from disk."
    from recsys.models import sequential
    from recsys.prep import pairs
    from recsys.training import next_item
    with patch.object(sequential, "log_of", wraps=sequential.log_of) as log, patch.object(pairs, "first_table", wraps=pairs.first_table) as table, \
            patch.object(next_item, "NextItem", wraps=next_item.NextItem) as task:
        model = sequential.fit(walks(150, 12), asof=1000, epochs=3, dim=16, tokens=300, dropout=0.0, patience=3, device="cpu", dtype="fp32", folder=folder)
    mapped = task.call_args.args[1].values
    (Path(folder) / f"made-{os.environ.get('RANK', 0)}").write_text(f"{log.call_count} {table.call_count} {isinstance(mapped, np.memmap)}")
    return {"losses": [p.loss for p in model.training.curve], "validation": model.training.validation, "world": model.training.world}


def test_two_processes_map_one_log_and_make_one_table(tmp_path: Path):
    one, folder = network(folder=str(tmp_path)), tmp_path / "two"
    two = launch.run(f"{HERE.stem}:network", {"folder": str(folder)}, folder=folder, nproc=2, path=[HERE.parent])
    assert (one["world"], two["world"]) == (1, 2) and np.allclose(one["losses"], two["losses"], rtol=0, atol=1e-4) and abs(one["validation"] - two["validation"]) < 0.02
    assert [(folder / f"made-{rank}").read_text() for rank in (0, 1)] == ["1 1 True", "0 0 True"]


def test_a_finished_training_does_not_begin_again(tmp_path: Path):
    first, second = fitted(tmp_path, epochs=1), fitted(tmp_path, epochs=1)
    assert first.curve == second.curve and second.steps == first.steps
    with pytest.raises(TrainingError, match="epochs = 1, not 2"): fitted(tmp_path, epochs=2)
