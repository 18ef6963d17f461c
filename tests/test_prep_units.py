"""Flags, windows and pairs against hand-written SQL, on random rows full of ties, edges, nulls and extreme values; and parts against the whole."""
from __future__ import annotations

import duckdb
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from recsys.prep.backend import partition_key
from recsys.prep.clean import BOT, LATE, REPEAT, clean, flagged
from recsys.prep.pairs import counted, links, pairs, strongest
from recsys.prep.sessions import SESSION, sessions
from recsys.prep.windows import SPANS, category_windows, item_windows, user_windows, windows
from recsys.schema import CATEGORY, EVENT_ID, EVENT_TYPES, EVENTS, ITEM_ID, KNOWN_TS, PRICE, QUANTITY, TS, TYPE, USER_ID, VALUE
from recsys.synth import DAY, HOUR, T0

SECOND = 1000
JUMPS = [0, 0, 1, SECOND - 1, SECOND, SECOND + 1, HOUR // 2, HOUR // 2 + 1, HOUR - 1, HOUR, HOUR + 1, DAY, 7 * DAY, 30 * DAY, 50 * 365 * DAY]
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pick(*values): return st.sampled_from(values)


row = st.fixed_dictionaries({
    USER_ID: pick("ann", "bob", "Ann", "чашка", ""), ITEM_ID: pick("mug", "pot", "☕", "tin", "'; --", None), TYPE: pick(*EVENT_TYPES[:4], *EVENT_TYPES[:4], *EVENT_TYPES),
    TS: pick(*(T0 + a + b for a in JUMPS for b in (0, HOUR))), KNOWN_TS: pick(0, 0, 1, HOUR, HOUR + 1), CATEGORY: pick("tea", "", None),
    PRICE: pick(None, 0.0, 0.005, 4.35, 19.99, 1e9), QUANTITY: pick(None, 1, 3, 1_000_000), VALUE: pick(None, None, 5.0)})
SCHEMA = EVENTS | {CATEGORY: pl.String()}


def frame_of(rows: list[dict]) -> pl.DataFrame:
    "Clean events, in no order; `known_ts` is drawn as a delay."
    names = {EVENT_ID: pl.String(), **{n: SCHEMA[n] for n in (USER_ID, ITEM_ID, TYPE, TS, KNOWN_TS, CATEGORY, PRICE, QUANTITY, VALUE)}}
    drawn = [r | {EVENT_ID: f"e{(37 * n) % 101:03}", KNOWN_TS: r[TS] + r[KNOWN_TS]} for n, r in enumerate(rows)]
    frame = pl.DataFrame(drawn, schema=names).filter(pl.col(ITEM_ID).is_not_null() | (pl.col(TYPE) == "search"))
    return frame.select(pl.col(n) if n in names else pl.lit(None, dtype=t).alias(n) for n, t in SCHEMA.items())


frames = st.lists(row, max_size=40).map(frame_of)
ORACLE = duckdb.connect(config={"threads": 1})


def sql(query: str, **tables: pl.DataFrame) -> pl.DataFrame:
    for name, frame in tables.items(): ORACLE.register(name, frame.to_arrow())
    return pl.from_arrow(ORACLE.sql(query).to_arrow_table())


def same(got: pl.LazyFrame, want: pl.DataFrame, *, ordered: bool = True) -> None:
    "Equal in every bit: floats too, since they are quotients of equal integers."
    rows = got.collect()
    assert_frame_equal(rows, want.cast(dict(rows.schema)), check_row_order=ordered, check_exact=True)


FLAGGED = """
with marked as (
    select *, count(*) over (partition by user_id order by ts range between 59999 preceding and current row) > {most} as fast,
        coalesce(ts - lag(ts) over (partition by user_id, type, item_id, quantity, price, value, context order by ts, event_id) <= 1000, false) as repeat
    from events)
select * exclude (fast, repeat), bool_or(fast) over (partition by user_id order by ts, event_id) as bot, repeat, known_ts - ts > 3600000 as late
from marked order by user_id, ts, event_id
"""
CENTS = "case when type = 'purchase' then floor(least(coalesce(coalesce(quantity, 1) * price, 0), 1e13) * 100 + 0.5)::bigint else 0 end"


def windows_sql(key: str, closed: str, spans: dict[str, int], *, source: str = "events") -> str:
    entity, parts, frames = key.removesuffix("_id"), [], []
    for name, span in spans.items():
        first, last = (span - 1, "current row") if closed == "right" else (span, "1 preceding")
        frames.append(f"w{name} as (partition by {key} order by ts range between {first} preceding and {last})")
        def total(value: str, w: str = f"w{name}") -> str: return f"coalesce(sum({value}) over {w}, 0)::bigint"
        kinds = {f"{kind}s": total(f"(type = '{kind}')::int") for kind in ("view", "cart", "purchase")}
        whole = {"events": total("1")} | kinds | {"spent_cents": total(CENTS)}
        parts += [f"{value} as {entity}_{measure}_{name}" for measure, value in whole.items()]
        parts += [f"{kinds[a]} / nullif({kinds['views']}, 0)::double as {entity}_{a}_per_views_{name}" for a in ("purchases", "carts")]
    return f"select *, {', '.join(parts)} from {source} where {key} is not null window {', '.join(frames)} order by {key}, ts, event_id"


@many
@given(frames, pick(0, 1, 3, 60))
def test_flags_equal_sql(frame: pl.DataFrame, most: int):
    same(flagged(frame.lazy(), most=most), sql(FLAGGED.format(most=most), events=frame).select(*SCHEMA, BOT, REPEAT, LATE)
         if frame.height else frame.with_columns(pl.lit(False).alias(n) for n in (BOT, REPEAT, LATE)))


@many
@given(frames, pick(*(T0 + j for j in JUMPS)))
def test_flags_and_windows_do_not_see_the_future(frame: pl.DataFrame, asof: int):
    past = pl.col(TS) < asof
    for unit in (flagged, user_windows, lambda lf: windows(lf, key=ITEM_ID, closed="left")):
        assert_frame_equal(unit(frame.lazy().filter(past)).collect(), unit(frame.lazy()).collect().filter(past), check_exact=True)


@many
@given(frames, pick(USER_ID, ITEM_ID, CATEGORY), pick("left", "right"))
def test_windows_equal_sql(frame: pl.DataFrame, key: str, closed: str):
    same(windows(frame.lazy(), key=key, closed=closed), sql(windows_sql(key, closed, SPANS), events=frame))


@many
@given(frames)
def test_windows_on_the_grid_equal_sql(frame: pl.DataFrame):
    source = "(select * replace (ceil(ts / 300000.0)::bigint * 300000 as ts) from events)"
    want = sql(windows_sql(ITEM_ID, "right", SPANS, source=source), events=frame)
    names = [ITEM_ID, TS, *want.columns[len(SCHEMA):]]
    same(item_windows(frame.lazy()), want.unique([ITEM_ID, TS], maintain_order=True).select(names))
    with pytest.raises(ValueError, match="multiple of grid_ms"): item_windows(frame.lazy(), spans={"7m": 420_000})


def test_money_beyond_reason_does_not_wrap():
    rich = pl.DataFrame({USER_ID: "a", EVENT_ID: [f"e{n:03}" for n in range(500)], TYPE: "purchase", TS: T0, PRICE: 1e9, QUANTITY: 1_000_000})
    assert user_windows(rich.lazy()).collect()["user_spent_cents_30d"].unique().to_list() == [500 * 10**15]


LINKS = """
with steps as (select *, {columns} from visits where item_id is not null window w as (partition by user_id, session order by ts, event_id))
"""


def links_sql(steps: int) -> str:
    columns = ", ".join(f"lead(item_id, {n}) over w as item{n}, lead(ts, {n}) over w as ts{n}" for n in range(1, steps + 1))
    each = " union all ".join(f"select least(item_id, item{n}) as item_id, greatest(item_id, item{n}) as other, ts{n} as ts from steps where item_id <> item{n}"
                              for n in range(1, steps + 1))
    return LINKS.format(columns=columns) + each


def pairs_sql(steps: int, half_life: int | None, asof: int | None, top: int) -> str:
    weight = "count(*)" if half_life is None else f"sum(floor(exp((ts - {asof}) * (ln(2) / {half_life})) * 1048576 + 0.5)::bigint) / 1048576.0::double"
    return f"""
        with links as ({links_sql(steps)}),
        once as (select item_id, other, count(*) as count, {weight} as weight from links where {'true' if asof is None else f'ts < {asof}'} group by item_id, other),
        twice as (select * from once union all select other, item_id, count, weight from once)
        select * from twice qualify row_number() over (partition by item_id order by weight desc, count desc, other) <= {top}
        order by item_id, weight desc, count desc, other"""


@many
@given(frames, pick(1, 2, 3), pick(None, DAY, 30 * DAY), pick(*(T0 + j + 1 for j in JUMPS)), pick(1, 2, 20))
def test_pairs_equal_sql(frame: pl.DataFrame, steps: int, half_life: int | None, asof: int, top: int):
    visits = sessions(frame.lazy()).collect()
    same(links(visits.lazy(), steps=steps), sql(links_sql(steps), visits=visits), ordered=False)
    asof_or_none = None if half_life is None else asof
    same(pairs(visits.sample(fraction=1.0, shuffle=True, seed=1).lazy(), window=steps, half_life_ms=half_life, asof=asof_or_none, top=top),
         sql(pairs_sql(steps, half_life, asof_or_none, top), visits=visits))


@pytest.mark.parametrize("call", [lambda f: links(f, steps=0), lambda f: strongest(f, top=0), lambda f: counted(f, half_life_ms=0, asof=1),
                                  lambda f: flagged(f, rate_ms=0), lambda f: flagged(f, late_ms=-1)])
def test_senseless_numbers_are_refused_with_a_remedy(call):
    with pytest.raises(ValueError, match="must be|needs|give"): call(pl.LazyFrame(schema=SCHEMA))


@many
@given(frames, pick(1, 2, 7))
def test_parts_equal_the_whole_bit_for_bit(frame: pl.DataFrame, n: int):
    visits = sessions(frame.lazy()).collect()
    linked = links(visits.lazy()).collect()
    both = counted(linked.lazy(), half_life_ms=DAY, asof=T0 + 400 * DAY).collect()
    def faded(lf: pl.LazyFrame) -> pl.LazyFrame: return counted(lf, half_life_ms=DAY, asof=T0 + 400 * DAY)
    units = [(flagged, flagged, frame), (user_windows, user_windows, frame), (item_windows, item_windows, frame), (category_windows, category_windows, frame),
             (clean, clean, frame.select(*EVENTS)), (links, links, visits), (counted, faded, linked), (strongest, strongest, both)]
    for declared, unit, data in units:
        key = partition_key(declared)
        part = data[key].fill_null("").hash(seed=2) % n
        whole, parts = unit(data.lazy()).collect(), pl.concat([unit(data.filter(part == p).lazy()).collect() for p in range(n)])
        assert_frame_equal(parts, whole, check_row_order=False, check_exact=True)
        if declared in (flagged, user_windows, item_windows, category_windows, strongest):  # and each key's rows are in the same order
            assert parts.sort(key, maintain_order=True).equals(whole)


def on_visits(unit): return lambda lf: unit(lf.with_columns(pl.lit(1, dtype=pl.Int64).alias(SESSION)))


@pytest.mark.parametrize("unit", [clean, flagged, user_windows, item_windows, category_windows, on_visits(links), on_visits(pairs)])
@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_units_need_no_rows_and_one_row_is_enough(unit, engine):
    nothing = unit(pl.LazyFrame(schema=SCHEMA)).collect(engine=engine)
    one = frame_of([{USER_ID: "a", ITEM_ID: "mug", TYPE: "view", TS: T0, KNOWN_TS: 0, CATEGORY: "tea", PRICE: None, QUANTITY: None, VALUE: None}])
    found = unit(one.lazy()).collect(engine=engine)
    assert nothing.height == 0 and nothing.schema == found.schema and found.height == (0 if ITEM_ID in found.columns and "other" in found.columns else 1)


@many
@given(frames)
def test_ids_may_be_numbers(frame: pl.DataFrame):
    "Encoded once, the same units give the same answer: what the benchmark does."
    number = {name: {v: n for n, v in enumerate(sorted(set(frame[name].drop_nulls()), key=str.encode))} for name in (USER_ID, ITEM_ID)}
    coded = frame.with_columns(pl.col(n).replace_strict(number[n], return_dtype=pl.Int32) for n in number)
    for unit in (sessions, flagged, user_windows, lambda lf: windows(lf, key=ITEM_ID, closed="left")):
        got, want = unit(coded.lazy()).collect(), unit(frame.lazy()).collect()
        assert_frame_equal(got.drop(*number), want.drop(*number), check_exact=True)
    named = {n: v for v, n in number[ITEM_ID].items()}
    got = pairs(sessions(coded.lazy())).with_columns(pl.col(ITEM_ID, "other").replace_strict(named, return_dtype=pl.String)).collect()
    assert_frame_equal(got, pairs(sessions(frame.lazy())).collect(), check_exact=True)
