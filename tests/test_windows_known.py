"""Windows as the platform knew them: both ways of computing them against a naive count, on random rows with late, early, twin and null ones."""
from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.prep.windows import MEASURES, RATIOS, SPANS, _added, _as_known, _rolled, known_windows, windows
from recsys.schema import CART, CATEGORY, EVENT_ID, ITEM_ID, KNOWN_TS, PRICE, PURCHASE, QUANTITY, SEQ, TS, TYPE, USER_ID, VIEW
from recsys.synth import DAY, HOUR, MINUTE, T0, shop

SHORT = {"1h": 60, "1d": 300, "7d": 1200}  # a clock on which edges are met often
KINDS = [VIEW, CART, PURCHASE, "search"]


@st.composite
def frames(draw: st.DrawFn, *, late: bool = True) -> pl.DataFrame:
    "Random events: few keys, times that touch the spans' edges, arrivals before, at and after the event's own time."
    n = draw(st.integers(0, 40))
    times = st.integers(0, 2000).map(lambda t: t // 20 * 20 + (t % 20 > 17) - (t % 20 < 2))
    ts = draw(st.lists(times, min_size=n, max_size=n))
    shift = draw(st.lists(st.sampled_from([0, 0, 0, 1, 59, 60, 61, 300, 1500, -1, -60, -700]) if late else st.just(0), min_size=n, max_size=n))
    one = st.lists(st.tuples(st.sampled_from(["ann", "bob", None]), st.sampled_from(["tea", "garden", None]), st.sampled_from(KINDS),
                             st.sampled_from([None, 0.005, 2.5, 19.99]), st.sampled_from([None, 0, 3]), st.sampled_from([None, 1, 5, 9])), min_size=n, max_size=n)
    rows = [{EVENT_ID: f"e{i}", USER_ID: u, CATEGORY: c, TYPE: k, PRICE: p, QUANTITY: q, SEQ: s, TS: T0 + t, KNOWN_TS: T0 + t + d}
            for i, ((u, c, k, p, q, s), t, d) in enumerate(zip(draw(one), ts, shift, strict=True))]
    return pl.DataFrame(rows, schema={EVENT_ID: pl.String, USER_ID: pl.String, CATEGORY: pl.String, TYPE: pl.String, PRICE: pl.Float64,
                                      QUANTITY: pl.Int64, SEQ: pl.Int64, TS: pl.Int64, KNOWN_TS: pl.Int64})


def counted(row: dict, measure: str) -> int:
    if measure == "events": return 1
    if measure == "spent_cents": return int((1 if row[QUANTITY] is None else row[QUANTITY]) * (row[PRICE] or 0.0) * 100 + 0.5) if row[TYPE] == PURCHASE else 0
    return int(row[TYPE] == {"views": VIEW, "carts": CART, "purchases": PURCHASE}[measure])


def naive(frame: pl.DataFrame, keys: list[str], spans: dict[str, int], grid: int) -> list[dict]:
    "The definition, read aloud."
    rows = [r for r in frame.to_dicts() if all(r[k] is not None for k in keys)]
    name, out = "_".join(k.removesuffix("_id") for k in keys), []
    for entity in sorted({tuple(r[k] for k in keys) for r in rows}):
        mine = [r for r in rows if tuple(r[k] for k in keys) == entity]
        for at in sorted({-(-r[KNOWN_TS] // grid) * grid for r in mine}):
            row = dict(zip(keys, entity, strict=True)) | {TS: at}
            for span, ms in spans.items():
                inside = [r for r in mine if r[KNOWN_TS] <= at and at - ms < min(r[TS], r[KNOWN_TS]) <= at]
                sums = {m: sum(counted(r, m) for r in inside) for m in MEASURES}
                row |= {f"{name}_{m}_{span}": v for m, v in sums.items()}
                row |= {f"{name}_{a}_per_{b}_{span}": sums[a] / sums[b] if sums[b] else None for a, b in RATIOS}
            out.append(row | {SEQ: max([r[SEQ] or 0 for r in mine if r[KNOWN_TS] <= at])})
    return out


@settings(max_examples=150, deadline=None)
@given(frames(), st.sampled_from([[USER_ID], [CATEGORY], [USER_ID, CATEGORY]]), st.sampled_from([1, 20]))
def test_known_windows_are_the_definition(frame: pl.DataFrame, keys: list[str], grid: int):
    found = known_windows(frame.lazy(), key=keys[0] if len(keys) == 1 else keys, spans=SHORT, grid_ms=grid).collect()
    assert found.to_dicts() == naive(frame, keys, SHORT, grid)
    assert found[TS].dtype == pl.Int64 and found[SEQ].dtype == pl.Int64


@settings(max_examples=60, deadline=None)
@given(frames(late=False), st.sampled_from([1, 20]))
def test_both_ways_are_one(frame: pl.DataFrame, grid: int):
    rows, options = _as_known(frame.lazy(), [USER_ID], MEASURES, grid), {"keys": [USER_ID], "spans": SHORT, "measures": MEASURES, "ratios": RATIOS}
    native = _rolled(rows, **options).collect()
    assert native.equals(_added(rows, **options).collect())
    if grid == 1: assert native.drop(SEQ).equals(windows(frame.lazy(), key=USER_ID, spans=SHORT).select(native.drop(SEQ).columns)
                                                 .unique([USER_ID, TS], keep="last", maintain_order=True).collect())


@settings(max_examples=60, deadline=None)
@given(frames(), st.integers(0, 2500), st.integers(0, 10))
def test_what_is_not_known_yet_changes_nothing(frame: pl.DataFrame, asof: int, order: int):
    whole = known_windows(frame.lazy(), key=USER_ID, spans=SHORT).filter(pl.col(TS) <= T0 + asof).collect()
    known = frame.filter(pl.col(KNOWN_TS) <= T0 + asof).sample(fraction=1.0, shuffle=True, seed=order)  # and the order of rows does not matter
    assert whole.equals(known_windows(known.lazy(), key=USER_ID, spans=SHORT).collect())


def test_a_clock_that_runs_ahead_is_taken_as_of_its_arrival():
    ahead = pl.LazyFrame({USER_ID: ["ann", "ann"], TYPE: [VIEW, VIEW], TS: [T0 + 9 * DAY, T0 + 2 * HOUR], KNOWN_TS: [T0, T0 + 2 * HOUR]})
    found = known_windows(ahead, key=USER_ID, measures=["events"], ratios=()).collect()
    assert found["user_events_1h"].to_list() == [1, 1] and found["user_events_1d"].to_list() == [1, 2] and found[SEQ].to_list() == [0, 0]


def test_late_and_punctual_keys_in_one_answer():
    events = shop().events.with_columns(pl.when(pl.col(USER_ID) == "ann").then(pl.col(KNOWN_TS) + 57 * MINUTE).otherwise(pl.col(KNOWN_TS)).alias(KNOWN_TS))
    found = known_windows(events.lazy(), key=USER_ID).collect()
    assert found.drop(SEQ).height == events.height and found.select(USER_ID, TS).equals(found.select(USER_ID, TS).sort(USER_ID, TS))
    assert found.filter(pl.col(USER_ID) == "ann")["user_events_1h"].to_list() == [1, 2, 1, 2, 1]


def test_refusals():
    frame = shop().events.lazy()
    with pytest.raises(ValueError, match="multiple of grid_ms = 300000"): known_windows(frame, key=ITEM_ID, spans={"7m": 420_000}, grid_ms=300_000)
    with pytest.raises(ValueError, match="must be 1 or more"): known_windows(frame, key=ITEM_ID, spans={"now": 0})
    with pytest.raises(ValueError, match="not among the measures"): known_windows(frame, key=ITEM_ID, spans=SPANS, measures=["events"])
