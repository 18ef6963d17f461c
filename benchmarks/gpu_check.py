"""Every transformation of recsys.prep on a GPU against the CPU: the same answer? how fast? `make gpu-check`, or `python benchmarks/gpu_check.py`.

Needs Python, polars, numpy and cudf-polars, and this checkout beside the script; torch and cudf are used where they are. Nothing is fetched.
For each unit: rows in and out, whether the answers are equal (exactly, or the largest relative difference of a float), the seconds of both
engines (best of `--repeats`, from a frame in host memory to a frame in host memory), and the bytes in and out for each second, against the
bandwidth of the card, measured by copying within it. Exit code 0 only if every answer is equal. `--engine cpu` compares the CPU with itself:
it proves the script, not a GPU.
"""
from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import polars as pl

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import recsys.prep  # noqa: E402
from recsys.prep.backend import EngineError, choose, collect, cuda_devices, to_cudf, to_torch  # noqa: E402
from recsys.schema import CATEGORY, EVENT_ID, EVENTS, ITEM_ID, ITEMS, KNOWN_TS, PRICE, PURCHASE, QUANTITY, TS, TYPE, USER_ID  # noqa: E402

START, DAY = 1_767_225_600_000, 86_400_000
TOLERANCE = 1e-12  # relative, of a float: a card may round the last bit of a logarithm otherwise
Frame = Callable[[], pl.DataFrame]


def made(rows: int, *, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    "Events of `schema.EVENTS`, with repeats, late and bad rows, and the catalogue; users and items are as skewed as a shop's."
    rng = np.random.default_rng(seed)
    users, items = max(2, rows // 40), max(2, min(50_000, rows // 20))
    user = np.minimum((users * rng.random(rows) ** 2).astype(np.int64), users - 1)
    item = np.minimum((items * rng.random(rows) ** 3).astype(np.int64), items - 1)
    visit = rng.integers(0, 60 * 24, rows) * 3_600_000  # hours: sessions, ties and pauses of all lengths
    ts = START + visit + rng.integers(0, 1200, rows) * 1000
    kind = np.array(["view", "view", "view", "cart", "purchase", "rating", "remove", "search"])[rng.integers(0, 8, rows)]
    frame = pl.DataFrame({"n": np.arange(rows), "user": user, "item": item, TS: ts, TYPE: kind, "late": rng.integers(0, 50, rows), PRICE: rng.integers(1, 9999, rows) / 100})
    frame = frame.select(
        (pl.lit("e") + pl.col("n").cast(pl.String)).alias(EVENT_ID), (pl.lit("user-") + pl.col("user").cast(pl.String)).alias(USER_ID),
        pl.when(pl.col(TYPE) != "search").then(pl.lit("item-") + pl.col("item").cast(pl.String)).alias(ITEM_ID), TYPE, TS,
        (pl.col(TS) + pl.when(pl.col("late") == 0).then(DAY).otherwise(0)).alias(KNOWN_TS),
        pl.when(pl.col(TYPE) == PURCHASE).then(pl.col("n") % 3 + 1).cast(EVENTS[QUANTITY]).alias(QUANTITY), pl.when(pl.col("late") != 1).then(PRICE).alias(PRICE))
    again = frame.gather_every(20).with_columns(pl.col(TS) + 1)
    events = pl.concat([frame, again]).select(pl.col(n).cast(t) if n in frame.columns else pl.lit(None, dtype=t).alias(n) for n, t in EVENTS.items())
    goods = pl.DataFrame({"n": np.arange(2 * items)}).select(
        (pl.lit("item-") + (pl.col("n") % items).cast(pl.String)).alias(ITEM_ID), (pl.lit("kind-") + (pl.col("n") % 97).cast(pl.String)).alias(CATEGORY),
        (pl.col("n") % 500 / 10).alias(PRICE), (START + pl.col("n") // items * DAY).alias(TS))
    return events, goods.select(pl.col(n).cast(t) if n in goods.columns else pl.lit(None, dtype=t).alias(n) for n, t in ITEMS.items())


@dataclass(frozen=True)
class Case:
    "One transformation with its options, and the rows it is run on."

    name: str
    unit: Callable[[pl.LazyFrame], pl.LazyFrame]
    frame: Frame  # made when it is needed


def units() -> dict[str, Callable]:
    "Every function of recsys.prep that declares a partition key, as `module.name`."
    found = {}
    for info in pkgutil.iter_modules(recsys.prep.__path__):
        module = importlib.import_module(f"recsys.prep.{info.name}")
        found |= {f"{info.name}.{n}": f for n, f in vars(module).items() if hasattr(f, "partition_key") and f.__module__ == module.__name__}
    return found


def examples(events: pl.DataFrame, items: pl.DataFrame) -> dict[str, list[tuple[dict, Frame]]]:
    "For each unit: its options and a frame it takes. A unit without an example is an error: add it here."
    from recsys.prep import clean, normalise, pairs, sessions, target, vocab
    kept: dict[str, pl.DataFrame] = {}

    def once(name: str, make: Frame) -> Frame:
        def give() -> pl.DataFrame:
            if name not in kept: kept[name] = make()
            return kept[name]
        return give
    asof = START + 30 * DAY
    tidy = once("tidy", lambda: clean.clean(events.lazy()).collect())
    seen = once("seen", lambda: clean.interactions(tidy().lazy()).collect())
    visits = once("visits", lambda: sessions.sessions(tidy().lazy()).collect())
    placed = once("placed", lambda: tidy().join(clean.latest_items(items.lazy()).select(ITEM_ID, CATEGORY).collect(), on=ITEM_ID, how="left", maintain_order="left"))
    bought = once("bought", lambda: placed().with_columns((pl.col(TYPE) == PURCHASE).alias("bought")))
    fold = once("fold", lambda: target.folded(bought().lazy()).collect())
    links = once("links", lambda: pairs.links(visits().lazy()).collect())
    counted = once("counted", lambda: pairs.counted(links().lazy()).collect())

    def vocabulary() -> dict: return {"vocab": vocab.Vocab.build(seen(), minimum=2)}
    def scales() -> dict: return {"by": normalise.fit(tidy().lazy(), {PRICE: "quantile", QUANTITY: "log", TS: "standardise"})}
    def encoding() -> dict: return {"by": target.fit(bought().lazy(), CATEGORY, "bought")}
    return {
        "clean.clean": [({}, lambda: events), ({"asof": asof}, lambda: events)], "clean.flagged": [({}, tidy)], "clean.interactions": [({}, tidy)],
        "clean.latest_items": [({}, lambda: items), ({"asof": asof}, lambda: items)], "sessions.sessions": [({}, tidy)], "vocab.counts": [({}, seen)],
        "sequences.ordered": [(vocabulary, seen)], "windows.user_windows": [({}, tidy)], "windows.item_windows": [({}, tidy)], "windows.category_windows": [({}, placed)],
        "pairs.links": [({}, visits)], "pairs.counted": [({}, links), ({"half_life_ms": 7 * DAY, "asof": asof}, links)], "pairs.strongest": [({}, counted)],
        "normalise.tally": [({"columns": [PRICE, QUANTITY]}, tidy)], "normalise.normalise": [(scales, tidy)],
        "target.tally": [({"column": CATEGORY, "target": "bought"}, fold)], "target.encode": [(encoding, bought)], "target.encode_out_of_fold": [(encoding, fold)]}


def cases(events: pl.DataFrame, items: pl.DataFrame) -> list[Case]:
    "A case for every unit. Raises LookupError naming units without an example."
    found, known = units(), examples(events, items)
    if missing := sorted(set(found) - set(known)): raise LookupError(f"no example frame for {', '.join(missing)}: add them to examples() in {Path(__file__).name}")

    def name(unit: str, options: dict | Callable) -> str: return f"{unit}({', '.join(options)})" if isinstance(options, dict) and options else unit
    def bound(unit: Callable, options: dict | Callable) -> Callable: return lambda frame: unit(frame, **(options() if callable(options) else options))
    return [Case(name(unit, options), bound(found[unit], options), frame) for unit in found for options, frame in known[unit]]


def difference(want: pl.DataFrame, got: pl.DataFrame) -> float | None:
    "0 where equal (rows in any order), the largest relative difference where only floats differ, None where anything else does."
    if want.schema != got.schema or want.height != got.height: return None
    if want.equals(got): return 0.0
    exact = [n for n, t in want.schema.items() if not t.is_float()]
    floats = [n for n, t in want.schema.items() if t.is_float()]
    order = [*exact, *floats]
    want, got = want.sort(order, nulls_last=True), got.sort(order, nulls_last=True)
    if not want.select(exact).equals(got.select(exact)): return None
    worst = 0.0
    for name in floats:
        a, b = want[name], got[name]
        if not (a.is_null() == b.is_null()).all() or not (a.is_nan().fill_null(False) == b.is_nan().fill_null(False)).all(): return None
        apart = ((a - b).abs() / pl.select(pl.max_horizontal(a.abs(), b.abs()).clip(1e-300)).to_series()).fill_nan(0.0).max()
        worst = max(worst, float(apart or 0.0))  # type: ignore[arg-type]
    return worst


def timed(run: Callable[[], pl.DataFrame], repeats: int) -> tuple[pl.DataFrame, float]:
    "The answer, and the fewest seconds."
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        answer = run()
        best = min(best, time.perf_counter() - start)
    return answer, best


def bandwidth() -> float | None:
    "GB/s read and written by copies within the card, or None where there is no way to ask."
    try:
        from cuda.bindings import runtime as cuda
    except ImportError: return None

    def sure(answer: tuple) -> object:
        if answer[0] != cuda.cudaError_t.cudaSuccess: raise RuntimeError(f"CUDA: {answer[0]}")
        return answer[1] if len(answer) > 1 else None
    size, rounds = 1 << 28, 50
    a, b = sure(cuda.cudaMalloc(size)), sure(cuda.cudaMalloc(size))
    try:
        for n in (3, rounds):
            sure(cuda.cudaDeviceSynchronize())
            start = time.perf_counter()
            for _ in range(n): sure(cuda.cudaMemcpyAsync(b, a, size, cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice, 0))
            sure(cuda.cudaDeviceSynchronize())
        return 2 * size * rounds / (time.perf_counter() - start) / 1e9
    finally:
        for pointer in (a, b): sure(cuda.cudaFree(pointer))


@dataclass
class Result:
    "One line of the report."

    events: int
    unit: str
    rows_in: int
    rows_out: int
    equal: bool
    difference: float | None
    cpu_seconds: float
    engine_seconds: float | None
    gb_per_second: float | None
    error: str = ""


def compared(case: Case, *, events: int, engine, repeats: int) -> Result:
    "One unit on both engines."
    frame = case.frame()
    want, cpu = timed(lambda: collect(case.unit(frame.lazy()), engine="cpu"), repeats)
    try: got, seconds = timed(lambda: collect(case.unit(frame.lazy()), engine=engine), repeats)
    except Exception as e:  # noqa: BLE001  whatever the engine says is the finding
        return Result(events, case.name, frame.height, want.height, False, None, cpu, None, None, f"{type(e).__name__}: {e}"[:2000])
    apart = difference(want, got)
    return Result(events, case.name, frame.height, want.height, apart is not None and apart <= TOLERANCE, apart, cpu, seconds,
                  (frame.estimated_size() + want.estimated_size()) / seconds / 1e9)


def to_device(events: pl.DataFrame, *, engine) -> dict:
    "Histories as torch tensors, on the card where the engine is one: over cudf and DLPack where cudf is, else from the host."
    try:
        import torch
    except ImportError: return {"torch": None, "said": "torch is not installed: sequences were not sent to it"}
    from recsys.prep.clean import clean, interactions
    from recsys.prep.sequences import Rows, from_frame, ordered
    from recsys.prep.vocab import ITEM, Vocab
    seen = interactions(clean(events.lazy())).collect()
    vocab = Vocab.build(seen, minimum=2)
    _, want = from_frame(seen, vocab, unknown=True)
    device, rows, way = "cuda" if engine.name == "gpu" else "cpu", want, "host"
    if engine.name == "gpu":
        try:
            items = to_cudf(ordered(seen.lazy(), vocab), engine=engine)[ITEM].values  # cupy
            rows, way = type("OnDevice", (), {"values": items, "offsets": want.offsets})(), "cudf, DLPack"
        except ImportError: pass
    values, offsets = to_torch(rows, device=device)
    same = Rows(values.cpu().numpy(), offsets.cpu().numpy()) == want
    return {"torch": torch.__version__, "device": str(values.device), "way": way, "values": len(want.values), "equal": same}


def versions() -> dict[str, str]:
    names = ("polars", "numpy", "cudf-polars-cu13", "pylibcudf-cu13", "libcudf-cu13", "cudf-cu13", "torch")
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in names if any(metadata.distributions(name=n))}


def card() -> str:
    "The name of the GPU as its driver gives it."
    try:
        import pynvml
        pynvml.nvmlInit()
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))
    except Exception as e:  # noqa: BLE001  a name is not worth a failure
        return f"unknown ({e})"


def table(results: list[Result]) -> str:
    out = [f"{'events':>10}  {'unit':<44} {'rows in':>10} {'rows out':>10}  {'equal':<9} {'cpu s':>8} {'engine s':>8} {'GB/s':>7}"]
    for r in results:
        equal = "exactly" if r.equal and not r.difference else f"{r.difference:.0e}" if r.equal else "NO"
        seconds, speed = (f"{v:8.3f}" if v is not None else "-" for v in (r.engine_seconds, r.gb_per_second))
        out.append(f"{r.events:>10}  {r.unit:<44} {r.rows_in:>10} {r.rows_out:>10}  {equal:<9} {r.cpu_seconds:8.3f} {seconds:>8} {speed:>7}")
        if r.error: out.append(f"{'':>12}{r.error}")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["gpu", "cpu"], default="gpu", help="what is compared with the CPU (default: gpu)")
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 10_000_000], help="sizes (default: 1000000 10000000)")
    parser.add_argument("--repeats", type=int, default=2, help="the best is reported (default: 2; the first run on a card is slow)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for gpu_check.json and gpu_check.txt")
    args = parser.parse_args()
    try: engine = choose(args.engine)
    except EngineError as e:
        print(f"gpu-check: not run. {e}", file=sys.stderr)
        return 1
    speed = bandwidth() if engine.name == "gpu" else None
    results: list[Result] = []
    sent: list[dict] = []
    for n in args.events:
        events, items = made(n)
        for case in cases(events, items):
            results.append(compared(case, events=n, engine=engine, repeats=args.repeats))
            print(table(results[-1:]).splitlines()[1], flush=True)
        sent.append({"events": n, **to_device(events, engine=engine)})
    about = {"engine": asdict(engine), "card": card() if engine.name == "gpu" else None, "devices": cuda_devices()[1], "gb_per_second_of_the_card": speed,
             "versions": versions(), "machine": f"{platform.system()} {platform.machine()}", "sequences": sent}
    good = all(r.equal for r in results) and all(s.get("equal", True) for s in sent)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_check.json").write_text(json.dumps(about | {"equal": good, "results": [asdict(r) for r in results]}, indent=1) + "\n")
    said = "\n".join([table(results), "", *(f"{k}: {v}" for k, v in about.items())])
    (args.out / "gpu_check.txt").write_text(said + "\n")
    print(said)
    print("every answer is equal" if good else "NOT EQUAL: see above", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__": sys.exit(main())
