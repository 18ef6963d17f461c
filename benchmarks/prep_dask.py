"""The six steps of `peers/prep_duckdb.py`, with the same outputs, by the platform's units on Dask workers.

Nothing is held whole: each step reads files and stores a file a partition, split anew where the next unit's key asks for it. Reports the peak
memory of every worker beside that of this process, which writes the outputs. Outputs, definitions and order: see `peers/prep_duckdb.py`.
"""
from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from functools import partial
from pathlib import Path

import polars as pl

from recsys.prep.backend import partitioned, run, store, workers
from recsys.prep.clean import clean
from recsys.prep.pairs import counted, links, strongest
from recsys.prep.sessions import SESSION, sessions
from recsys.prep.vocab import EVENTS_COUNT, ITEM, counts
from recsys.prep.windows import windows
from recsys.schema import EVENT_ID, EVENTS, ITEM_ID, PRICE, TS, TYPE, USER_ID

START, END = 1_767_225_600_000, 1_767_225_600_000 + 90 * 86_400_000
WEEK = {"7d": 7 * 86_400_000}
COLUMNS = [EVENT_ID, USER_ID, ITEM_ID, TYPE, TS, PRICE]


def valid(raw: pl.LazyFrame) -> pl.LazyFrame:
    """The peers' row rules, and the columns that events of the platform have besides."""
    rows = raw.filter(pl.col(TYPE).is_in(["view", "cart", "purchase"]), pl.col(PRICE) >= 0, pl.col(TS).is_between(START, END, closed="left"))
    return rows.with_columns(pl.lit(None, dtype=kind).alias(name) for name, kind in EVENTS.items() if name not in COLUMNS)


@partitioned(by=EVENT_ID)
def cleaned(rows: pl.LazyFrame) -> pl.LazyFrame: return clean(rows).select(COLUMNS)


def coded(rows: pl.LazyFrame, *, items: Path) -> pl.LazyFrame:
    """Item numbers for ids, and no prices."""
    numbered = rows.join(pl.scan_parquet(items).select(ITEM_ID, ITEM), on=ITEM_ID)
    return numbered.select(EVENT_ID, USER_ID, pl.col(ITEM).alias(ITEM_ID), TYPE, TS)


@partitioned(by=USER_ID)
def shoppers(rows: pl.LazyFrame) -> pl.LazyFrame: return week(sessions(rows), key=USER_ID)


@partitioned(by=ITEM_ID)
def goods(rows: pl.LazyFrame) -> pl.LazyFrame: return week(rows, key=ITEM_ID).select(EVENT_ID, "^.*_7d$")


def week(rows: pl.LazyFrame, *, key: str) -> pl.LazyFrame:
    return windows(rows, key=key, spans=WEEK, closed="left", measures=("events", "purchases"), ratios=())


@partitioned(by=USER_ID)
def latest(rows: pl.LazyFrame) -> pl.LazyFrame:
    """A user's last 50 items; position 0 is the last."""
    newest = rows.sort(USER_ID, TS, EVENT_ID, descending=[False, True, True])
    place = pl.int_range(pl.len(), dtype=pl.Int32).over(USER_ID).alias("position")
    return newest.select(USER_ID, place, pl.col(ITEM_ID).alias(ITEM)).filter(pl.col("position") < 50)


def peak_rss_gb() -> float:
    """Of the process that asks, since its start (`ru_maxrss` would know of its parent's)."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def usage() -> float:
    return sum(getattr(resource.getrusage(who), part) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) for part in ("ru_utime", "ru_stime"))


def steps(events: str, out: Path, work: Path, client) -> tuple[int, dict[str, float]]:
    """Run the six steps; wall seconds of each (the workers' CPU is known only when they have ended)."""
    took: dict[str, float] = {}
    mark = time.perf_counter()

    def done(name: str, files: list[Path], *columns: pl.Expr | str) -> None:
        pl.scan_parquet(files).select(columns or pl.all()).sink_parquet(out / f"{name}.parquet", compression="snappy")
        tell(name)

    def tell(name: str) -> None:
        nonlocal mark
        took[name] = round(time.perf_counter() - mark, 2)
        mark = time.perf_counter()
        print(f"{name:10s} {took[name]} s", flush=True)

    def on_workers(unit, files, name: str, **more) -> list[Path]: return store(unit, files, work / name, cluster=client, rows=500_000, engine="cpu", **more)

    clean_files = on_workers(cleaned, events, "clean", per_file=valid)
    done("clean", clean_files)
    items = run(counts, clean_files, cluster=client, engine="cpu").sort(EVENTS_COUNT, ITEM_ID, descending=[True, False])
    items.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias(ITEM)).write_parquet(out / "items.parquet")
    tell("items")
    visits = on_workers(shoppers, clean_files, "visits", per_file=partial(coded, items=out / "items.parquet"))
    done("sessions", visits, EVENT_ID, SESSION)
    done("windows", on_workers(goods, visits, "goods"), EVENT_ID, pl.col("^.*_7d$").name.map(lambda name: name.removesuffix("_7d")))
    both = on_workers(counted, on_workers(links, visits, "links"), "counted")
    done("pairs", on_workers(strongest, both, "strongest"), pl.col(ITEM_ID).alias(ITEM), "other", "count")
    done("sequences", on_workers(latest, visits, "latest"))
    return pl.scan_parquet(clean_files).select(pl.len()).collect().item(), took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", required=True, help="raw events, Parquet (peers/events.py)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the six outputs")
    parser.add_argument("--threads", type=int, default=2, help="workers, of one thread each")
    parser.add_argument("--memory", default="1GB", help="of a worker: it spills to disk before it takes more")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.out / "parts"
    shutil.rmtree(work, ignore_errors=True)
    began = time.perf_counter()
    with workers("local", count=args.threads, memory=args.memory) as client:
        rows, took = steps(args.events, args.out, work, client)
        peaks = [round(gb, 3) for gb in client.run(peak_rss_gb).values()]
    shutil.rmtree(work)
    print(json.dumps({"peer": "recsys on dask", "workers": args.threads, "rows": rows, "step_wall_s": took, "cpu_s": round(usage(), 2),
                      "wall_s": round(time.perf_counter() - began, 2), "worker_peak_rss_gb": peaks, "own_peak_rss_gb": round(peak_rss_gb(), 3)}))


if __name__ == "__main__":
    main()
