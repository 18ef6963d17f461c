"""Offline tables: what came in makes the same rows as everything anew; and training sets that are Feast's answer, on random shops."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.features.definitions import ITEM_CATALOGUE, RANKER_V1, RETRIEVAL_V1, TABLES, USER_WINDOWS, VIEWS, Service
from recsys.features.offline import build, categories, erase, historical, training_frame, view_rows
from recsys.lake.tables import Lake
from recsys.prep.clean import NoTimes, clean
from recsys.schema import (
    AVAILABLE_FROM,
    BRAND,
    CART,
    CATEGORY,
    EVENT_ID,
    EVENTS,
    IN_STOCK,
    ITEM_ID,
    ITEMS,
    KNOWN_TS,
    PRICE,
    PURCHASE,
    QUANTITY,
    SEARCH,
    SEQ,
    TS,
    TS_IS_ORDER,
    TYPE,
    USER_ID,
    VIEW,
)
from recsys.synth import DAY, HOUR, MINUTE, T0, shop

LAGS = np.array([0, 0, 0, 1, 299_999, 300_000, HOUR, DAY, 8 * DAY, 40 * DAY, -1, -HOUR, -2 * DAY])  # arrival after (before) the event's own time


def random_events(rng: np.random.Generator, n: int, *, first: int = 0) -> pl.DataFrame:
    "Events of few shoppers and items over 100 days, in bursts; late, early, doubled, without item, price or place in a log."
    ts = T0 + rng.integers(0, 20, n) * 5 * DAY + rng.integers(0, 60, n) * MINUTE + rng.integers(-1, 2, n)
    kinds = rng.choice([VIEW, CART, PURCHASE, SEARCH], n, p=[.6, .15, .15, .1])
    known = ts + LAGS[rng.integers(0, len(LAGS), n)]
    rows = {EVENT_ID: [f"e{first + i - (i > 3 and rng.random() < 0.1) * 3}" for i in range(n)], USER_ID: [f"u{u}" for u in rng.integers(0, 4, n)],
            ITEM_ID: [None if k == SEARCH else f"i{i}" for k, i in zip(kinds, rng.integers(0, 6, n), strict=True)], TYPE: kinds, TS: ts, KNOWN_TS: known,
            TS_IS_ORDER: False, QUANTITY: rng.choice([1, 2], n), PRICE: np.round(rng.random(n) * 50, 2), SEQ: first + rng.permutation(n)}
    frame = pl.DataFrame(rows, schema_overrides=EVENTS)
    return pl.concat([pl.DataFrame(schema=EVENTS), frame.with_columns(pl.when(pl.col(SEQ) % 4 > 0).then(SEQ))], how="diagonal")


def random_items(rng: np.random.Generator, n: int) -> pl.DataFrame:
    "Catalogue rows of fewer items than have events, some without category, some twice at one time."
    rows = {ITEM_ID: [f"i{i}" for i in rng.integers(0, 5, n)], CATEGORY: [["tea", "tea/cups", None][c] for c in rng.integers(0, 3, n)], BRAND: "b",
            PRICE: np.round(rng.random(n) * 9, 2), IN_STOCK: rng.random(n) < 0.5, AVAILABLE_FROM: T0, TS: T0 + rng.integers(-5, 60, n) * DAY}
    return pl.concat([pl.DataFrame(schema=ITEMS), pl.DataFrame(rows, schema_overrides=ITEMS)], how="diagonal")


def tables(offline: Lake) -> dict[str, pl.DataFrame]: return {name: offline.scan(name).collect().sort(*v.keys, TS) for name, v in VIEWS.items()}


def same(one: dict[str, pl.DataFrame], other: dict[str, pl.DataFrame]) -> None:
    for name in VIEWS: assert one[name].equals(other[name]), f"{name}: {one[name].join(other[name], on=one[name].columns, how='anti', nulls_equal=True)}"


@pytest.mark.parametrize("seed", range(3))
def test_what_came_in_makes_the_same_rows_as_everything_anew(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    lake, grown = Lake(tmp_path / "lake"), Lake(tmp_path / "grown", tables=TABLES)
    lake.append("items", random_items(rng, 8))
    events = random_events(rng, 120).sort(KNOWN_TS)
    cuts = sorted(rng.choice(np.arange(10, 115), 3, replace=False))
    for n, (lo, hi) in enumerate(zip([0, *cuts], [*cuts, 120], strict=True)):
        lake.append("events", events[int(lo):int(hi)])
        done = build(lake, grown)
        since = done["user_windows"].since or 0  # files that were joined count whole
        assert since == (0 if n == 0 else events[KNOWN_TS][int(lo)] if n != 2 else events[KNOWN_TS][0])
        if n == 1: lake.compact("events", full=True)
    if seed % 3 == 0: lake.append("events", random_events(rng, 20, first=200))  # of long ago
    if seed % 3 == 1: lake.append("items", random_items(rng, 3).with_columns(pl.col(TS) + 200 * DAY))  # other categories
    if seed % 3 == 2: lake.delete("events", f"{USER_ID} = 'u1'")
    build(lake, grown)
    anew = Lake(tmp_path / "anew", tables=TABLES)
    build(lake, anew, rows_at_once=40)
    same(tables(grown), tables(anew))
    assert all(b.since is None for b in build(lake, grown).values())
    for name, v in VIEWS.items():  # and both are what one pass says
        told = view_rows(v, events=clean(lake.scan("events")), items=lake.scan("items")).collect()
        assert tables(anew)[name].equals(told.sort(*v.keys, TS)) and not told.select(*v.keys, TS).is_duplicated().any()


def test_a_moment_of_the_grid_keeps_the_events_of_builds_within_it(tmp_path: Path):
    lake, grown = Lake(tmp_path / "lake"), Lake(tmp_path / "grown", tables=TABLES)
    lake.append("items", shop().items)
    one = shop().events.filter(pl.col(ITEM_ID).is_in(["mug", "tin"])).unique(ITEM_ID, keep="first").sort(ITEM_ID).select(list(EVENTS))
    for n, minute in enumerate((1, 2, 4, 6, 9)):  # mug, tin, mug, ...: by turns within five minutes
        at = pl.lit(T0 + 90 * DAY + minute * MINUTE, dtype=pl.Int64)
        lake.append("events", one[n % 2:n % 2 + 1].with_columns(at.alias(TS), at.alias(KNOWN_TS), pl.lit(f"g{n}").alias(EVENT_ID)))
        build(lake, grown)
    whole = Lake(tmp_path / "whole", tables=TABLES)
    build(lake, whole)
    same(tables(grown), tables(whole))
    assert grown.rows("item_windows") == 4


def test_a_build_reads_back_no_further_than_it_must(tmp_path: Path):
    lake, offline = Lake(tmp_path / "lake"), Lake(tmp_path / "offline", tables=TABLES)
    assert {b.rows for b in build(lake, offline).values()} == {0}  # a home without anything
    events = shop().events
    lake.append("items", shop().items)
    lake.append("events", events[:20])
    assert build(lake, offline)["user_windows"].rows == 20
    version = offline.version("user_windows")
    assert build(lake, offline)["user_windows"].version == version  # nothing came: no commit
    lake.append("events", events[20:])
    done = build(lake, offline)
    assert done["user_windows"].since == events[KNOWN_TS][20] and done["item_catalogue"].since is None and done["user_windows"].rows == 23


def test_other_definitions_make_the_table_anew(tmp_path: Path):
    from dataclasses import replace
    lake = Lake(tmp_path / "lake")
    lake.append("items", shop().items)
    lake.append("events", shop().events)
    small = replace(USER_WINDOWS, spans=("1h", "1d"), features=tuple(f for f in USER_WINDOWS.features if f.name.endswith(("_1h", "_1d"))))
    offline = Lake(tmp_path / "offline", tables={**TABLES, "user_windows": small.table})
    assert build(lake, offline, views=[small])["user_windows"].since == 0
    wider = Lake(tmp_path / "offline", tables=TABLES)
    assert build(lake, wider, views=[USER_WINDOWS])["user_windows"].since == 0
    assert wider.scan("user_windows").collect()["user_events_30d"].null_count() == 0


def test_events_that_hold_only_an_order_have_no_windows(tmp_path: Path):
    lake, offline = Lake(tmp_path / "lake"), Lake(tmp_path / "offline", tables=TABLES)
    lake.append("events", shop().events.with_columns(pl.lit(True).alias(TS_IS_ORDER)))
    with pytest.raises(NoTimes, match="hold only an order"): build(lake, offline)


def test_erasing_leaves_nothing_of_a_shopper(tmp_path: Path):
    lake, offline = Lake(tmp_path / "lake"), Lake(tmp_path / "offline", tables=TABLES)
    lake.append("items", shop().items)
    lake.append("events", shop().events)
    build(lake, offline)
    lake.delete("events", f"{USER_ID} = 'ann'")
    assert erase(offline, ["ann"]) == 10 and erase(offline, []) == 0
    build(lake, offline)
    assert "ann" not in offline.scan("user_windows").collect()[USER_ID] and "ann" not in offline.scan("user_category").collect()[USER_ID]
    assert offline.scan("item_windows").filter(pl.col(ITEM_ID) == "pot").collect()["item_purchases_30d"].max() == 0


def entities_of(rng: np.random.Generator, offline: Lake, n: int) -> pl.DataFrame:
    "Keys known and unknown, at moments on, just beside and a lifetime after the rows of the tables; some asked twice."
    moments = np.concatenate([offline.scan(name).collect()[TS].to_numpy() for name in VIEWS] + [np.array([T0])])
    at = rng.choice(moments, n) + rng.choice([0, 1, -1, 90 * DAY, 90 * DAY + 1, HOUR], n)
    frame = pl.DataFrame({USER_ID: [f"u{u}" for u in rng.integers(0, 5, n)], ITEM_ID: [f"i{i}" for i in rng.integers(0, 8, n)],
                          CATEGORY: rng.choice(["tea", "tea/cups", "none"], n), TS: at, "label": rng.random(n)}, schema_overrides={TS: pl.Int64})
    return pl.concat([frame, frame.sample(fraction=0.2, seed=1)])


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory):
    "A home with Feast's store over its offline lake."
    from recsys.features.store import open_store
    from recsys.settings import Home, load
    home = Home.open(tmp_path_factory.mktemp("home"))
    return open_store(home, load({})), Lake(home.features / "offline", tables=TABLES)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), service=st.sampled_from([RANKER_V1, RETRIEVAL_V1]))
def test_training_frame_is_feasts_answer(judge, tmp_path_factory: pytest.TempPathFactory, seed: int, service: Service):
    rng, (store, offline) = np.random.default_rng(seed), judge
    lake = Lake(tmp_path_factory.mktemp("lake"))
    lake.append("items", random_items(rng, 8))
    lake.append("events", random_events(rng, int(rng.integers(1, 80))))
    build(lake, offline, whole=True)
    asked = entities_of(rng, offline, 60)
    ours = training_frame(asked, service, scan=offline.scan, filled=False, ages=False)
    assert ours.equals(historical(asked, service, store=store))
    assert ours.select(asked.columns).equals(asked)


def test_defaults_and_ages(tmp_path: Path):
    lake, offline = Lake(tmp_path / "lake"), Lake(tmp_path / "offline", tables=TABLES)
    lake.append("items", shop().items)
    lake.append("events", shop().events)
    asked = pl.DataFrame({USER_ID: ["ann", None], ITEM_ID: ["pot", "x"], TS: [T0 + 200 * DAY, T0 + DAY]})
    empty = training_frame(asked, RETRIEVAL_V1, scan=offline.scan)  # nothing was built yet
    assert [{n: row[n] for n in RETRIEVAL_V1.missing()} for row in empty.to_dicts()] == [RETRIEVAL_V1.missing()] * 2
    build(lake, offline)
    stale = training_frame(asked, RETRIEVAL_V1, scan=offline.scan).to_dicts()[0]
    assert stale["user_events_30d"] == 0 and stale["user_windows_age_ms"] is None and stale["item_price"] == 20.0 and stale["item_catalogue_age_ms"] == 200 * DAY
    assert training_frame(asked[:0], RETRIEVAL_V1, scan=offline.scan).height == 0


@pytest.mark.parametrize(("frame", "message"), [
    ({USER_ID: ["ann"], ITEM_ID: ["pot"]}, "column ts is missing"), ({USER_ID: ["ann"], ITEM_ID: ["pot"], TS: [1.5]}, "ts is Float64 with 0 nulls"),
    ({USER_ID: ["ann"], ITEM_ID: ["pot"], TS: pl.Series([None], dtype=pl.Int64)}, "1 nulls"),
    ({USER_ID: ["ann"], ITEM_ID: ["pot"], TS: [1], "item_price": [2.0]}, "item_price would be there twice"), ({ITEM_ID: ["pot"], TS: [1]}, "column user_id is missing")])
def test_refusals(frame: dict, message: str):
    with pytest.raises(ValueError, match=message): training_frame(pl.DataFrame(frame), RETRIEVAL_V1, scan=lambda name: pl.LazyFrame())


def test_the_catalogue_as_it_was(tmp_path: Path):
    items = shop().items.filter(pl.col(ITEM_ID) == "pot")
    later = items.with_columns(pl.lit(15.0).alias(PRICE), pl.lit("garden").alias(CATEGORY), (pl.col(TS) + 3 * DAY).alias(TS))
    told = view_rows(ITEM_CATALOGUE, events=pl.LazyFrame(), items=pl.concat([later, items, items]).lazy()).collect()
    assert told["item_price"].to_list() == [20.0, 15.0] and told["item_category"].to_list() == ["home/tea", "garden"]
    assert categories(pl.concat([later, items]).lazy()).collect().rows() == [("pot", "garden")]
