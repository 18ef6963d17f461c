"""The six steps of `peers/prep_duckdb.py`, with the same outputs, made of this platform's units.

Ids are encoded once, where the file is read: the units ask nothing of an id but that it can be compared, so numbers do as well as text.
Every unit sorts for itself; sorting what is sorted already costs next to nothing. Outputs, definitions and order: see `peers/prep_duckdb.py`;
`peers/prep_check.py` defines equality.

What did not help (CPU seconds, a million rows): reading and cleaning in one lazy plan, which reads the file three times (0.9 against 0.5); ids
as text (a sort by user, time and id 0.8 against 0.35); `pyarrow` with `read_dictionary` (0.67 against 0.27 for Polars with a cast); sorting by
`arg_sort_by` and `gather` (3.3), by a struct (0.85) or by three stable sorts (0.34); leaving out Parquet statistics (no difference).
"""
from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

START, END = 1_767_225_600_000, 1_767_225_600_000 + 90 * 86_400_000
WEEK = {"7d": 7 * 86_400_000}


def usage() -> tuple[float, float]:
    """CPU seconds of this process and its children, and the wall clock."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime, time.perf_counter()


def run(events: str, out: Path) -> dict:
    """Run the six steps; CPU and wall seconds of each."""
    import numpy as np
    import polars as pl

    from recsys.prep.clean import clean
    from recsys.prep.pairs import counted, links, strongest
    from recsys.prep.sequences import Sequences, ends
    from recsys.prep.sessions import SESSION, sessions
    from recsys.prep.vocab import EVENTS_COUNT, ITEM, counts
    from recsys.prep.windows import windows
    from recsys.schema import EVENT_ID, ITEM_ID, PRICE, TS, TYPE, USER_ID

    out.mkdir(parents=True, exist_ok=True)
    steps: dict[str, dict[str, float]] = {}
    mark = usage()

    def done(name: str, frame: pl.DataFrame) -> None:
        nonlocal mark
        frame.write_parquet(out / f"{name}.parquet", compression="snappy")
        after = usage()
        steps[name] = {"cpu_s": round(after[0] - mark[0], 2), "wall_s": round(after[1] - mark[1], 2)}
        print(f"{name:10s} {steps[name]}", flush=True)
        mark = after

    ids = [USER_ID, ITEM_ID]
    raw = pl.scan_parquet(events).filter(
        pl.col(ITEM_ID).is_not_null(), pl.col(TYPE).is_in(["view", "cart", "purchase"]), pl.col(PRICE) >= 0, pl.col(TS).is_between(START, END, closed="left"))
    raw = raw.with_columns(pl.col(*ids, TYPE).cast(pl.Categorical)).collect(engine="streaming")  # in one plan with `clean` it would be read three times
    columns = [EVENT_ID, *ids, TYPE, TS, PRICE]
    cleaned = clean(raw.lazy()).select(columns).collect(engine="streaming")
    del raw  # every large frame goes as soon as it is not needed any more: peak memory is part of the score
    done("clean", cleaned)

    items = counts(cleaned.lazy()).collect().with_columns(pl.col(ITEM_ID).cast(pl.String).alias("name")).sort(EVENTS_COUNT, "name", descending=[True, False])
    named = cleaned.lazy().select(pl.col(USER_ID).to_physical().alias("code"), USER_ID).unique("code").collect(engine="streaming")
    coded = cleaned.lazy().select(EVENT_ID, pl.col(ids).to_physical(), TYPE, TS)
    rows_kept = cleaned.height
    del cleaned
    visits = sessions(coded).collect()
    del coded
    done("sessions", visits.select(EVENT_ID, SESSION))

    done("items", items.select(pl.col("name").alias(ITEM_ID), pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias(ITEM), EVENTS_COUNT))
    code = items[ITEM_ID].to_physical().to_numpy()
    number = np.zeros(code.max(initial=0) + 1, np.int32)
    number[code] = np.arange(1, len(code) + 1)
    visits = visits.with_columns(pl.Series(ITEM_ID, number[visits[ITEM_ID].to_numpy()]))

    rows = visits.lazy().select(EVENT_ID, USER_ID, ITEM_ID, TYPE, TS)
    for key in ids:
        rows = windows(rows, key=key, spans=WEEK, closed="left", measures=["events", "purchases"], ratios=())
    done("windows", rows.select(EVENT_ID, pl.col("^.*_7d$").name.map(lambda name: name.removesuffix("_7d"))).collect())

    near = counted(links(visits.lazy().select(EVENT_ID, USER_ID, ITEM_ID, TS, SESSION), steps=2)).collect()
    near = strongest(near.lazy(), top=20).select(pl.col(ITEM_ID).alias(ITEM), "other", "count").collect()
    done("pairs", near)
    del near

    users = visits[USER_ID].rle().struct.unnest()
    histories = Sequences(visits[ITEM_ID].to_numpy(), ends(users["len"].to_numpy())).last(50)
    of, at = histories.rows(), np.arange(len(histories.values))
    position = (histories.offsets[1:][of] - 1 - at).astype(np.int32)
    name = users.join(named, left_on="value", right_on="code", how="left", maintain_order="left")[USER_ID].gather(of)
    done("sequences", pl.DataFrame({USER_ID: name, "position": position, ITEM: histories.values}))
    return {"rows": rows_kept, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", required=True, help="raw events, Parquet (peers/events.py)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the six outputs")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    os.environ["POLARS_MAX_THREADS"] = str(args.threads)  # both are read once, when polars is imported
    os.environ.setdefault("_RJEM_MALLOC_CONF", "dirty_decay_ms:500,muzzy_decay_ms:5000")  # by default freed pages stay resident: 3.8 GB at 10M rows
    import polars

    import recsys
    cpu, wall = usage()
    result = run(args.events, args.out)
    after = usage()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"peer": "recsys", "version": recsys.__version__, "polars": polars.__version__, "threads": args.threads, **result,
                      "cpu_s": round(after[0] - cpu, 2), "wall_s": round(after[1] - wall, 2), "peak_rss_mb": peak // 1024}))


if __name__ == "__main__":
    main()
