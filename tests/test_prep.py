"""Prep against oracles: hand-written SQL in DuckDB for the frames, plain Python for the arrays, on random data full of ties and edges."""
from __future__ import annotations

import math

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from recsys.prep.backend import partition_key
from recsys.prep.clean import NoTimes, clean, interactions, latest_items, require_times
from recsys.prep.sequences import Sequences, from_frame, ordered
from recsys.prep.sessions import SESSION, sessions
from recsys.prep.vocab import ITEM, Vocab, counts
from recsys.schema import (
    BRAND,
    EVENT_ID,
    EVENT_TYPES,
    EVENTS,
    ITEM_ID,
    ITEMS,
    KNOWN_TS,
    POSITIVE_TYPES,
    PRICE,
    QUANTITY,
    TITLE,
    TS,
    TS_IS_ORDER,
    TYPE,
    USER_ID,
)
from recsys.synth import T0

GAP = 30 * 60_000
TIMES = [T0, T0 + 1, T0 + GAP - 1, T0 + GAP, T0 + GAP + 1, T0 + 2 * GAP, T0 + 2 * GAP + 1, T0 + 5 * GAP]
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pick(*values): return st.sampled_from(values)


def mostly(*good, bad): return pick(*good * 4, *bad)  # a row with several faults says no more than a row with one


raw = st.fixed_dictionaries({
    EVENT_ID: mostly(*"abcde", bad=[None]), USER_ID: mostly("ann", "bob", "Ann", "чашка", bad=[None, ""]),
    ITEM_ID: mostly("mug", "pot", "☕", "'; --", bad=[None]), TYPE: mostly(*EVENT_TYPES, bad=[None, "click"]),
    TS: mostly(*TIMES[::2], bad=[None, 0, 1, 4_102_444_800_000, *TIMES]), KNOWN_TS: mostly(*TIMES[:3], bad=[None, *TIMES]), TS_IS_ORDER: pick(None, False, True),
    PRICE: mostly(None, 0.0, 4.5, bad=[1e9, -1.0, 1e10, math.nan, math.inf, -math.inf]), QUANTITY: pick(None, 1, 1_000_000)})
frames = st.lists(raw, max_size=30).map(lambda rows: pl.DataFrame(rows, schema={n: EVENTS[n] for n in raw_columns}).pipe(widen, EVENTS))
raw_columns = [EVENT_ID, USER_ID, ITEM_ID, TYPE, TS, KNOWN_TS, TS_IS_ORDER, PRICE, QUANTITY]
items = st.lists(st.fixed_dictionaries({ITEM_ID: pick(None, "mug", "pot", "tin"), TITLE: pick(None, "a", "b"), BRAND: pick(None, "x", "y"),
                                        PRICE: pick(None, 1.0, 2.0), TS: st.one_of(st.none(), pick(*TIMES))}), max_size=15).map(
    lambda rows: pl.DataFrame(rows, schema={n: ITEMS[n] for n in (ITEM_ID, TITLE, BRAND, PRICE, TS)}).pipe(widen, ITEMS))


def widen(frame: pl.DataFrame, schema) -> pl.DataFrame:
    return frame.select(pl.col(n) if n in frame.columns else pl.lit(None, dtype=t).alias(n) for n, t in schema.items())


ORACLE = duckdb.connect(config={"threads": 1})


def sql(query: str, **tables: pl.DataFrame) -> pl.DataFrame:
    for name, frame in tables.items(): ORACLE.register(name, frame.to_arrow())
    return pl.from_arrow(ORACLE.sql(query).to_arrow_table())


def same(got: pl.LazyFrame | pl.DataFrame, want: pl.DataFrame, *, ordered: bool = False) -> None:
    assert_frame_equal(got.lazy().collect(), want.cast(dict(got.lazy().collect_schema())), check_row_order=ordered)


FIRST = [KNOWN_TS, TS, USER_ID, *(c for c in EVENTS if c not in (KNOWN_TS, TS, USER_ID, EVENT_ID))]
CLEAN = f"""
with valid as (
    select * replace (coalesce(known_ts, ts) as known_ts, coalesce(ts_is_order, false) as ts_is_order) from events
    where event_id is not null and user_id is not null and ts is not null and type in {EVENT_TYPES}
      and (item_id is not null or type = 'search') and (price is null or (not isnan(price) and price >= 0 and price <= 1e9)))
select * from valid where {{when}}
qualify row_number() over (partition by event_id order by {', '.join(f'{c} asc nulls first' for c in FIRST)}) = 1
"""
SESSIONS = f"""
with gaps as (
    select *, coalesce(ts - lag(ts) over in_time > {GAP}, true)::int as opens from cleaned
    window in_time as (partition by user_id order by ts, event_id))
select * exclude opens, sum(opens) over (partition by user_id order by ts, event_id) as session from gaps order by user_id, ts, event_id
"""
LATEST = f"""
select * from items where item_id is not null and {{when}}
qualify row_number() over (partition by item_id order by {', '.join(f'{c} desc nulls last' for c in [TS, *(c for c in ITEMS if c not in (TS, ITEM_ID))])}) = 1
"""


@many
@given(frames, st.one_of(st.none(), pick(*TIMES)))
def test_clean_equals_sql(frame: pl.DataFrame, asof: int | None):
    same(clean(frame.lazy(), asof=asof), sql(CLEAN.format(when="true" if asof is None else f"ts < {asof} and known_ts < {asof}"), events=frame))


@many
@given(frames)
def test_clean_is_stable_and_ignores_the_order_of_rows(frame: pl.DataFrame):
    once = clean(frame.lazy()).collect()
    assert once[EVENT_ID].is_unique().all()
    assert_frame_equal(clean(once.lazy()).collect(), once, check_row_order=False)
    assert_frame_equal(clean(frame.reverse().lazy()).collect(), once, check_row_order=False)
    assert_frame_equal(clean(pl.concat([frame, frame]).lazy()).collect(), once, check_row_order=False)


@many
@given(frames)
def test_sessions_equal_sql(frame: pl.DataFrame):
    cleaned = clean(frame.lazy()).collect()
    same(sessions(cleaned.lazy()), sql(SESSIONS, cleaned=cleaned), ordered=True)
    assert sessions(cleaned.lazy()).collect_schema()[SESSION] == pl.Int64


@many
@given(frames)
def test_interactions_and_counts_equal_sql(frame: pl.DataFrame):
    cleaned = clean(frame.lazy()).collect()
    same(interactions(cleaned.lazy()), sql(f"select user_id, item_id, type, ts from c where type in {POSITIVE_TYPES} and item_id is not null order by user_id, ts, event_id",
                                           c=cleaned), ordered=True)
    same(counts(cleaned.lazy()), sql("select item_id, count(*) as events from c where item_id is not null group by item_id", c=cleaned))


@many
@given(items, st.one_of(st.none(), pick(*TIMES)))
def test_latest_items_equal_sql(frame: pl.DataFrame, asof: int | None):
    same(latest_items(frame.lazy(), asof=asof), sql(LATEST.format(when="true" if asof is None else f"ts < {asof}"), items=frame))


@many
@given(frames, items, pick(1, 2, 7))
def test_partitioned_equals_whole(frame: pl.DataFrame, goods: pl.DataFrame, n: int):
    cleaned = clean(frame.lazy()).collect()
    learnt = interactions(cleaned.lazy()).collect()
    vocab = Vocab.build(learnt)
    units = [(clean, frame), (sessions, cleaned), (interactions, cleaned), (counts, learnt), (latest_items, goods), (lambda lf: ordered(lf, vocab), learnt)]
    for unit, data in units:
        key = USER_ID if unit.__name__ == "<lambda>" else partition_key(unit)
        part = data[key].fill_null("").hash(seed=1) % n
        whole, parts = unit(data.lazy()).collect(), pl.concat([unit(data.filter(part == p).lazy()).collect() for p in range(n)])
        assert_frame_equal(parts, whole, check_row_order=False)
        if USER_ID in whole.columns and unit is not clean:  # and each user's rows are in the same order
            assert_frame_equal(parts.sort(USER_ID, maintain_order=True), whole)


@pytest.mark.parametrize("unit", [clean, sessions, interactions, counts, latest_items])
def test_units_stream_and_need_no_rows(unit):
    schema = ITEMS if unit is latest_items else EVENTS
    assert unit(pl.LazyFrame(schema=schema)).collect().height == 0
    assert unit(pl.LazyFrame(schema=schema)).collect(engine="streaming").height == 0


def test_a_pause_of_exactly_the_gap_ends_nothing():
    frame = pl.LazyFrame({USER_ID: ["a"] * 3 + ["b"] * 2, EVENT_ID: list("vwxyz"), TS: [T0, T0 + GAP, T0 + 2 * GAP + 1, T0, T0 + GAP + 1]})
    assert sessions(frame, gap_ms=GAP).collect()[SESSION].to_list() == [1, 1, 2, 1, 2]


def test_copies_known_at_the_same_time_have_one_winner():
    one = dict.fromkeys(EVENTS) | {EVENT_ID: "a", USER_ID: "bob", ITEM_ID: "pot", TYPE: "view", TS: T0, KNOWN_TS: T0}
    copies = [one, one | {USER_ID: "ann", ITEM_ID: "tin"}, one | {USER_ID: "ann", ITEM_ID: "mug"}, one | {USER_ID: "Zoe", KNOWN_TS: T0 + 1}]
    for n in range(4):
        rolled = pl.DataFrame(copies[n:] + copies[:n], schema=EVENTS)
        assert clean(rolled.lazy()).collect().select(USER_ID, ITEM_ID).rows() == [("ann", "mug")]


def test_order_only_events_are_refused_by_name():
    frame = pl.DataFrame({TS: [T0, T0 + 1], TS_IS_ORDER: [False, True]})
    with pytest.raises(NoTimes, match="ts_is_order"): require_times(frame)
    with pytest.raises(NoTimes, match="ts = 7"): require_times(pl.LazyFrame({TS: [7]}))
    require_times(pl.LazyFrame({TS: [T0], TS_IS_ORDER: [None]}))
    require_times(pl.DataFrame(schema=EVENTS))
    with pytest.raises(TypeError, match="partitioned"): partition_key(require_times)  # type: ignore[arg-type]


words = st.lists(st.one_of(st.none(), st.text(max_size=4)), max_size=30)


@many
@given(words, words, st.one_of(st.none(), st.integers(0, 3)), st.integers(1, 3))
def test_vocab_goes_there_and_back(known: list, asked: list, seed: int | None, minimum: int):
    vocab = Vocab.build(pl.Series(known, dtype=pl.String), minimum=minimum, seed=seed)
    want = {w for w in known if w is not None and known.count(w) >= minimum}
    assert set(vocab.ids) == want and len(vocab) == len(want) + 1
    if seed is None: assert vocab.ids.to_list() == sorted(want, key=str.encode)
    codes = vocab.encode(asked)
    assert codes.dtype == np.int32 and vocab.decode(codes) == [w if w in want else None for w in asked]
    assert (vocab.encode(pl.Series(asked, dtype=pl.String)) == codes).all()
    assert vocab.encoded(pl.LazyFrame({ITEM_ID: asked}, schema={ITEM_ID: pl.String})).collect()[ITEM].to_list() == codes.tolist()
    assert Vocab.build(pl.Series(known, dtype=pl.String).reverse(), minimum=minimum, seed=seed) == vocab


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(ValueError, match="a vocabulary has one"): Vocab.read(tmp_path / "v.parquet")


lists = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=8)


@many
@given(lists, st.integers(0, 4), st.integers(-9, 9), st.integers(-9, 9))
def test_sequences_are_lists(rows: list, n: int, a: int, b: int):
    s = Sequences.from_lists(rows)
    def back(x: Sequences) -> list: return [r.tolist() for r in x]
    assert back(s) == rows and len(s) == len(rows) and s.lengths.tolist() == [len(r) for r in rows]
    assert back(s[a:b]) == rows[a:b] and back(s.last(n)) == [r[-n:] if n else [] for r in rows]
    assert back(s.keep(s.values > 4)) == [[v for v in r if v > 4] for r in rows]
    assert s.rows().tolist() == [q for q, r in enumerate(rows) for _ in r]
    index = np.arange(len(rows))[::-1]
    assert back(s.take(index)) == rows[::-1] and Sequences(s.values.copy(), s.offsets.copy()) == s
    for q in (-len(rows) - 1, len(rows)):
        with pytest.raises(IndexError): s[q]


@many
@given(frames, st.booleans())
def test_histories_equal_plain_python(frame: pl.DataFrame, unknown: bool):
    learnt = interactions(clean(frame.lazy())).collect()
    vocab = Vocab.build(learnt, minimum=2)
    users, found = from_frame(learnt, vocab, unknown=unknown)
    want: dict[str, list] = {}
    for user, item, _, _ in sorted(learnt.rows(), key=lambda r: (r[0].encode(), r[3])):  # stable: ties as they came
        want.setdefault(user, []).append(item if item in set(vocab.ids) else None)
    assert users.to_list() == list(want)
    assert [vocab.decode(r) for r in found] == [w if unknown else [i for i in w if i] for w in want.values()]
