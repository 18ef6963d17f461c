"""Normalising and target encoding against hand-written SQL in DuckDB, in parts against the whole, on random data full of ties and odd values."""
from __future__ import annotations

import math

import duckdb
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from recsys.prep.normalise import FAR, Normaliser, fit, fit_tallies, normalise, tally
from recsys.schema import PRICE, TS, USER_ID

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ORACLE = duckdb.connect(config={"threads": 1})


def sql(query: str, **tables: pl.DataFrame) -> pl.DataFrame:
    for name, frame in tables.items(): ORACLE.register(name, frame.to_arrow())
    return pl.from_arrow(ORACLE.sql(query).to_arrow_table())  # type: ignore[return-value]


def pick(*values): return st.sampled_from(values)


plain = pick(None, 0.0, -0.0, 1.0, 1.5, 2.0, 20.0, -3.0, math.nan, math.inf, -math.inf)
wide = st.one_of(plain, st.floats(-1e12, 1e12), st.floats(0, 1))
extreme = st.one_of(plain, st.floats(), pick(1e308, -1e308, 5e-324))


def shelves(value): return st.lists(st.fixed_dictionaries({USER_ID: pick(None, "ann", "bob", "Ann", "чашка", ""), TS: st.integers(0, 9), PRICE: value}), max_size=40).map(
    lambda rows: pl.DataFrame(rows, schema={USER_ID: pl.String, TS: pl.Int64, PRICE: pl.Float64}))


METHODS = ("standardise", "log", "quantile")
TRANSFORM = {"standardise": "price", "log": "sign(price) * ln(1 + abs(price))"}
STATISTICS = """select count(price) as n, avg({x}) as centre, stddev_pop({x}) as spread from t where not isnan(price) and not isinf(price) and ts < {asof}"""
SHARES = """
with values as (select price, count(*) as n from t where not isnan(price) and not isinf(price) and ts < {asof} group by price),
ranked as (select price, sum(n) over (order by price) as upto, n, sum(n) over () as total from values),
wanted as (select unnest(range({quantiles} + 1)) as j)
select distinct price + 0.0 as edge, (upto - n / 2.0) / total as share from ranked
where exists (select * from wanted where upto * {quantiles} >= j * total and (upto - n) * {quantiles} < j * total) or upto = n
order by edge
"""


@many
@given(shelves(wide), pick("standardise", "log"), st.integers(0, 10))
def test_moments_equal_sql(frame: pl.DataFrame, method: str, asof: int):
    [got] = fit(frame.lazy(), {PRICE: method}, asof=asof).scales
    [(n, centre, spread)] = sql(STATISTICS.format(x=TRANSFORM[method], asof=asof), t=frame).rows()
    assert got.rows == n
    size = max(1.0, *frame[PRICE].fill_nan(None).abs().map_elements(lambda v: v if math.isfinite(v) else 0.0, return_dtype=pl.Float64).drop_nulls().to_list(), 1.0)
    assert got.centre == pytest.approx(centre or 0.0, abs=1e-12 * size) and got.spread == pytest.approx(spread or 0.0, rel=1e-9, abs=1e-7 * size)


@many
@given(shelves(wide), pick(2, 4, 32), st.integers(0, 10))
def test_quantiles_equal_sql(frame: pl.DataFrame, quantiles: int, asof: int):
    [got] = fit(frame.lazy(), {PRICE: "quantile"}, asof=asof, quantiles=quantiles).scales
    want = sql(SHARES.format(quantiles=quantiles, asof=asof), t=frame)
    assert list(got.edges) == want["edge"].to_list() and list(got.shares) == pytest.approx(want["share"].to_list(), abs=1e-12)


@many
@given(shelves(wide), shelves(wide), pick(*METHODS))
def test_applied_equals_sql(training: pl.DataFrame, frame: pl.DataFrame, method: str):
    normaliser = fit(training.lazy(), {PRICE: method}, quantiles=4)
    [s] = normaliser.scales
    got = normalise(frame.lazy(), by=normaliser).collect()
    if method == "quantile":
        ORACLE.register("edges", pl.DataFrame({"e": s.edges, "s": s.shares}, schema={"e": pl.Float64, "s": pl.Float64}).to_arrow())
        rule = """case when (select count(*) from edges) < 2 then 0.5 else coalesce(
            (select a.s + (price - a.e) / (b.e - a.e) * (b.s - a.s) from edges a, edges b where a.e <= price and price < b.e
             and not exists (select * from edges c where a.e < c.e and c.e < b.e)),
            case when price < (select min(e) from edges) then (select min(s) from edges) else (select max(s) from edges) end) end"""
    elif s.spread == 0: rule = "0.0"
    else: rule = f"least(greatest(({TRANSFORM[method]} - {s.centre!r}::double) / {s.spread!r}::double, -{FAR}), {FAR})"
    neutral = 0.5 if method == "quantile" else 0.0
    usable = "price is not null and not isnan(price) and not isinf(price)"
    want = sql(f"select user_id, ts, case when {usable} then {rule} else {neutral} end::double as price from t", t=frame)
    assert_frame_equal(got, want, check_row_order=method != "quantile", rel_tol=1e-9, abs_tol=1e-9)


@many
@given(shelves(extreme), shelves(extreme), pick(*METHODS))
def test_no_value_breaks_a_model(training: pl.DataFrame, frame: pl.DataFrame, method: str):
    normaliser = fit(training.lazy(), {PRICE: method})
    [s] = normaliser.scales
    assert math.isfinite(s.centre) and math.isfinite(s.spread) and all(a < b for a, b in zip(s.edges, s.edges[1:], strict=False))
    got = normalise(frame.lazy(), by=normaliser).collect()[PRICE]
    low, high = (0, 1) if method == "quantile" else (-FAR, FAR)
    assert got.null_count() == 0 and got.is_finite().all() and got.is_between(low, high).all()
    order = frame[PRICE].fill_null(math.nan).is_finite().arg_true()
    along = got.gather(order.gather(frame[PRICE].gather(order).arg_sort()))
    assert (along.diff().drop_nulls() >= -1e-12).all()  # larger values never get smaller numbers


@many
@given(shelves(extreme), pick(*METHODS), pick(1, 2, 7), st.randoms())
def test_statistics_do_not_depend_on_the_split_or_the_order(frame: pl.DataFrame, method: str, n: int, random):
    part = frame[USER_ID].fill_null("").hash(seed=1) % n
    parts = [frame.filter(part == p) for p in range(n)]
    whole = fit(frame.lazy(), {PRICE: method})
    rows = list(range(frame.height))
    random.shuffle(rows)
    assert repr(fit([p.lazy() for p in parts], {PRICE: method})) == repr(fit(frame[rows].lazy(), {PRICE: method})) == repr(whole)  # every bit, and the sign of zero
    assert fit_tallies([pl.concat([tally(p.lazy(), columns=[PRICE]).collect() for p in parts])], {PRICE: method}) == whole
    split = pl.concat([normalise(p.lazy(), by=whole).collect() for p in parts])
    assert_frame_equal(split, pl.concat(parts).lazy().pipe(normalise, by=whole).collect(), check_exact=True)
    assert_frame_equal(normalise(frame.lazy(), by=whole).collect(engine="streaming"), normalise(frame.lazy(), by=whole).collect(), check_exact=True)


@many
@given(shelves(extreme))
def test_a_normaliser_survives_its_file(tmp_path_factory, frame: pl.DataFrame):
    path = tmp_path_factory.mktemp("n") / "normaliser.json"
    normaliser = fit(frame.lazy(), {PRICE: "log", TS: "quantile"})
    normaliser.write(path)
    assert repr(Normaliser.read(path)) == repr(normaliser)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "scales": []}', '{"format": 1, "scales": [{"column": "x"}]}', '{"format": 1, "scales": [{"colour": 1}]}'])
def test_a_file_that_is_no_normaliser_is_refused(tmp_path, text: str):
    (tmp_path / "n.json").write_text(text)
    with pytest.raises(ValueError, match="Normaliser.write"): Normaliser.read(tmp_path / "n.json")


def test_a_constant_or_empty_column_says_nothing():
    for values in ([], [None, math.nan], [7.0] * 9):
        frame = pl.LazyFrame({PRICE: values}, schema={PRICE: pl.Float64})
        for method, neutral in zip(METHODS, (0.0, 0.0, 0.5), strict=True):
            got = normalise(pl.LazyFrame({PRICE: [7.0, 8.0, -1e300, None]}), by=fit(frame, {PRICE: method})).collect()
            assert got[PRICE].to_list() == [neutral] * 4


def test_whole_numbers_and_wrong_words():
    got = normalise(pl.LazyFrame({"n": [1, 3, None]}), by=fit(pl.LazyFrame({"n": [1, 3]}), {"n": "standardise"})).collect()
    assert got["n"].to_list() == [-1.0, 1.0, 0.0] and fit(pl.LazyFrame({"n": [1]}), {}) == Normaliser(())
    with pytest.raises(ValueError, match="quantiles = 1"): fit(pl.LazyFrame({"n": [1]}), {"n": "quantile"}, quantiles=1)
    with pytest.raises(ValueError, match="must be one of standardise"): fit(pl.LazyFrame({"n": [1]}), {"n": "minmax"})  # type: ignore[dict-item]
    large = fit(pl.LazyFrame({"n": [2**63 - 1, 0]}), {"n": "standardise"})
    assert normalise(pl.LazyFrame({"n": [2**63 - 1, -(2**63)]}), by=large).collect()["n"].is_finite().all()
