"""What `peers/train_plain.py` does, by this platform's network and trainer: the same file, the same split, and its JSON on the last line.

Leave-one-out: the last item is the test, the one before it the validation, the rest is learned from; every item is ranked, seen ones are masked, ties count
half. `--shape plain` is the peer's network as near as ours comes to it (width 64, two blocks, one head, no gates, no convolution) and `--loss one` its loss: binary
cross-entropy with one unseen negative for each position. Tokens are positions that are learned from; padding does not count. Seconds are of training alone.
`test` is looked at after every epoch where `--curve` is given, and decides nothing.
"""
from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys.models.forward import forward_of
from recsys.models.sequential import Sequential
from recsys.prep.pairs import first_table
from recsys.prep.sequences import from_frame
from recsys.training import protocols
from recsys.training.cluster import gemm_rate
from recsys.training.evaluate import evaluate
from recsys.training.network import Net, Shape
from recsys.training.next_item import NextItem
from recsys.training.pace import Options
from recsys.training.splits import before_last, leave_one_out
from recsys.training.trainer import train

SHAPES: dict[str, dict[str, Any]] = {"plain": {"dim": 64, "blocks": 2, "heads": 1, "ffn": 1.0, "conv": 0, "gated": False},
                                     "ours": {"dim": 64, "blocks": 2, "heads": 1, "ffn": 2.0, "conv": 4},
                                     "wide": {"dim": 128, "blocks": 2, "heads": 2, "ffn": 2.0, "conv": 4}}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def flops(shape: Shape, net: Net, mean_length: float) -> float:
    "Of the matrix products of a position, forward and backward: the blocks' weights, and attention over half of a mean row. The loss is left out."
    weights = sum(p.numel() for name, p in net.named_parameters() if name.startswith("blocks.") and p.dim() == 2 and not name.endswith("conv"))
    return 3 * 2 * (weights + shape.blocks * 2 * shape.dim * mean_length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--loss", choices=("one", "softmax"), default="one")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="plain")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=3000, help="positions of a batch")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--curve", action="store_true", help="evaluate after every epoch")
    parser.add_argument("--svd", action="store_true", help="start from the factors of co-visitation")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    corpus = protocols.read(args.data, "loo", seed=args.seed)
    rows = protocols.interactions(corpus)
    questions = {part: leave_one_out(rows, part, corpus.vocab, history=1_000_000) for part in ("validation", "test")}
    histories = from_frame(before_last(rows, "validation").lazy(), corpus.vocab)[1]
    histories = histories.take(np.flatnonzero(histories.lengths > 1))
    shape = Shape(len(corpus.vocab), length=args.length, **SHAPES[args.shape])
    net = Net(shape, dropout=args.dropout)
    counts = np.bincount(histories.values, minlength=len(corpus.vocab)).astype(np.int64)
    paused, evaluations, began = 0.0, list[dict[str, Any]](), cpu_seconds()
    if args.svd:
        with torch.no_grad(): net.item.weight.copy_(torch.from_numpy(first_table(histories, len(corpus.vocab), shape.dim, seed=args.seed)))

    def measured() -> float:
        "Judge the net as it is; the time is not training's."
        nonlocal paused
        started, spent = cpu_seconds(), cpu_seconds() - began - paused
        model = Sequential(corpus.vocab, forward_of(net), counts, np.empty((0, shape.dim), np.float32), False, len(rows) + 1)
        found = {part: evaluate(model, cases, k=10, seed=0, rounds=2) for part, cases in questions.items()}
        evaluations.append({"train_cpu_s": round(spent, 1)} | {name: {"hr10": round(e.intervals["hit@10"].mean, 4), "ndcg10": round(e.intervals["ndcg@10"].mean, 4)}
                                                               for name, e in (("valid", found["validation"]), ("test", found["test"]))})
        paused += cpu_seconds() - started
        return evaluations[-1]["valid"]["ndcg10"]

    task = NextItem(net, histories, seed=args.seed, tokens=args.tokens, loss=args.loss)
    options = Options(epochs=args.epochs, minutes=args.max_minutes, lr=args.lr, seed=args.seed, device="cpu", dtype=args.dtype)
    done = train(task, options, validate=measured if args.curve else None)
    spent = cpu_seconds() - began - paused
    if not args.curve: measured()
    plan = task.plan(0)
    work = flops(shape, net, float(np.mean([(b[:, 2] - b[:, 1]).mean() for b in plan])))
    dtype = torch.bfloat16 if done.dtype in ("bf16", "bfloat16") else torch.float32
    peak = gemm_rate(dtype, seconds=0.2)
    print(json.dumps({"peer": "train_recsys", "torch": torch.__version__, "threads": args.threads, "seed": args.seed, "users": len(histories), "items": len(corpus.vocab) - 1,
                      "loss": args.loss, "shape": args.shape, "dtype": done.dtype, "epochs": round(done.epochs, 3), "tokens": done.targets, "tokens_per_s": round(done.rate),
                      "tokens_per_cpu_s": round(done.targets / spent), "train_s": round(done.seconds, 1), "train_cpu_s": round(spent, 1), "cpu_s": round(cpu_seconds(), 1),
                      "data_share": round(done.data_share, 4), "last_loss": round(done.loss, 4), "gflop_per_cpu_s": round(done.targets / spent * work / 1e9, 2),
                      "gemm_gflop_per_s": round(peak / 1e9 if peak > 1e6 else peak, 1), "evaluations": evaluations, "at": round(time.time())}))


if __name__ == "__main__":
    main()
