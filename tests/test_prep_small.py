"""Normalising and target encoding against hand-written SQL in DuckDB, in parts against the whole, on random data full of ties and odd values."""
from __future__ import annotations

import math

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from recsys.prep.normalise import FAR, Normaliser, fit, fit_tallies, normalise, tally
from recsys.prep.target import Encoding, encode, encode_out_of_fold, fold_name, folded
from recsys.prep.target import fit as fit_target
from recsys.schema import ITEM_ID, PRICE, TS, USER_ID

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


visits = st.lists(st.fixed_dictionaries({
    USER_ID: pick(None, "ann", "bob", "cat", "dan", "eve", "чашка", ""), ITEM_ID: pick(None, "mug", "pot", "☕", "", "'; --"), TS: st.integers(0, 9),
    "y": pick(None, 0.0, 1.0, 0.25, -3.0, 1e5, -1e5, 1e-7, math.nan, math.inf)}), max_size=40).map(
    lambda rows: pl.DataFrame(rows, schema={USER_ID: pl.String, ITEM_ID: pl.String, TS: pl.Int64, "y": pl.Float64}))
TRAINING = "from t where y is not null and not isnan(y) and not isinf(y) and ts < {asof}"
ENCODED = """
with training as (select item_id, {fold} as fold, round(y * 1e6) as y {training}),
asked as (select *, {fold} as fold, row_number() over () as n from a),
others as (select asked.n, count(t.y) as rows, sum(t.y) / 1e6 as total, count(t.y) filter (t.item_id = asked.item_id) as own,
                  sum(t.y) filter (t.item_id = asked.item_id) / 1e6 as own_total
           from asked left join training t on {who} group by asked.n)
select user_id, item_id, ts, y, (coalesce(own_total, 0) + {w} * coalesce(total / nullif(rows, 0), 0)) / (own + {w}) as item_id_y
from asked join others using (n) order by n
"""


@many
@given(visits, visits, pick(0.5, 20.0), pick(2, 5), st.integers(0, 10), st.booleans())
def test_encodings_equal_sql(training: pl.DataFrame, asked: pl.DataFrame, weight: float, folds: int, asof: int, held_out: bool):
    encoding = fit_target(training.lazy(), ITEM_ID, "y", weight=weight, folds=folds, asof=asof)
    got = (encode_out_of_fold if held_out else encode)(asked.lazy(), by=encoding).collect()
    t, a = (folded(f.lazy(), folds=folds).collect() for f in (training, asked))
    want = sql(ENCODED.format(fold=fold_name(folds), training=TRAINING.format(asof=asof), w=weight, who="t.fold <> asked.fold" if held_out else "true"), t=t, a=a)
    assert_frame_equal(got, want, rel_tol=1e-9, abs_tol=1e-9)


@many
@given(visits, pick(1, 2, 7), st.randoms())
def test_encodings_do_not_depend_on_the_split_or_the_order(frame: pl.DataFrame, n: int, random):
    part = frame[USER_ID].fill_null("").hash(seed=1) % n
    parts = [frame.filter(part == p) for p in range(n)]
    rows = list(range(frame.height))
    random.shuffle(rows)
    whole = fit_target(frame.lazy(), ITEM_ID, "y")
    assert fit_target([p.lazy() for p in parts], ITEM_ID, "y") == fit_target(frame[rows].lazy(), ITEM_ID, "y") == whole
    for unit in (encode, encode_out_of_fold):
        split = pl.concat([unit(p.lazy(), by=whole).collect() for p in parts])
        assert_frame_equal(split, unit(pl.concat(parts).lazy(), by=whole).collect(), check_exact=True)
        assert_frame_equal(unit(frame.lazy(), by=whole).collect(engine="streaming"), unit(frame.lazy(), by=whole).collect(), check_exact=True)


@many
@given(visits, st.integers(0, 4))
def test_no_answer_reaches_its_own_fold(frame: pl.DataFrame, fold: int):
    def told(f: pl.DataFrame) -> pl.Series:
        return encode_out_of_fold(f.lazy(), by=fit_target(f.lazy(), ITEM_ID, "y")).collect()["item_id_y"].filter(inside)
    inside = folded(frame.lazy()).collect()["fold5"] == fold
    other = frame.with_columns(pl.when(inside).then(7.0 - pl.col("y").fill_nan(3.0).abs()).otherwise("y").alias("y"))  # other answers of this fold's users
    assert told(frame).equals(told(other))


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_learnt_from_noise(seed: int):
    rng = np.random.default_rng(seed)
    who, coin, favourite = rng.integers(0, 4000, 20_000), rng.integers(0, 2, 4000), rng.integers(0, 500, 4000)
    item = np.where(rng.random(20_000) < 0.8, favourite[who], rng.integers(0, 500, 20_000))
    frame = pl.LazyFrame({USER_ID: [f"u{n}" for n in who], ITEM_ID: [f"i{n}" for n in item], "y": coin[who]})
    encoding = fit_target(frame, ITEM_ID, "y", weight=1.0)
    naive, held = (float(unit(frame, by=encoding).select(pl.corr("item_id_y", "y")).collect().item()) for unit in (encode, encode_out_of_fold))
    assert naive > 0.25 and abs(held) < 4 / 4000**0.5  # 4 standard errors of as many independent users


def test_what_is_known_is_kept(tmp_path):
    frame = pl.LazyFrame({USER_ID: [f"u{n}" for n in range(4000)], ITEM_ID: ["good", "bad"] * 2000, "y": [True, False] * 2000})
    encoding = fit_target(frame, ITEM_ID, "y")
    held = encode_out_of_fold(frame, by=encoding).group_by(ITEM_ID).agg(pl.col("item_id_y").mean()).sort(ITEM_ID).collect()["item_id_y"].to_list()
    assert held == pytest.approx([0.0062, 0.9938], abs=0.0005)  # (0 + 20 * 0.5) / (1600 + 20)
    encoding.write(tmp_path / "e.parquet")
    assert Encoding.read(tmp_path / "e.parquet") == encoding != fit_target(frame, ITEM_ID, "y", weight=3)
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="not a target encoding"): Encoding.read(tmp_path / "x.parquet")


def test_target_encoding_refuses_what_it_cannot_sum():
    frame = pl.LazyFrame({USER_ID: ["ann", "bob"], ITEM_ID: ["mug", "pot"], "y": [1.0, -1e6]})
    with pytest.raises(ValueError, match="y = 1e.06: a target must lie within 100000"): fit_target(frame, ITEM_ID, "y")
    for wrong in ({"weight": 0}, {"weight": math.nan}, {"folds": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))): fit_target(frame, ITEM_ID, "y", **wrong)
    empty = fit_target(frame.clear(), ITEM_ID, "y")
    assert encode(frame, by=empty).collect()["item_id_y"].to_list() == encode_out_of_fold(frame, by=empty).collect()["item_id_y"].to_list() == [0.0, 0.0]
