"""What was done with which slot, against a query written by hand for DuckDB, on random lists and events."""
from __future__ import annotations

import duckdb
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.schema import (
    EVENT_ID,
    EVENTS,
    IMPRESSIONS,
    ITEM_ID,
    KNOWN_TS,
    PROPENSITY,
    RANK,
    RECOMMENDATION_ID,
    SCORE,
    SLOTS,
    SOURCE,
    TS,
    TYPE,
    USER_ID,
)
from recsys.training.feedback import DID, gather

WINDOW, SETTLE = 50, 10

ITEM, USER, MOMENT = st.sampled_from("abcd"), st.sampled_from(["u", "v"]), st.integers(1_000, 1_200)
LIST = st.tuples(st.one_of(st.none(), USER), MOMENT, st.lists(ITEM, min_size=1, max_size=3, unique=True))
EVENT = st.tuples(USER, MOMENT, ITEM, st.sampled_from(["view", "cart", "purchase", "remove", "rating"]), st.one_of(st.none(), st.integers(0, 5)))

BY_HAND = """
WITH slots AS (SELECT id, who, shown_at, item FROM shown WHERE shown_at < $upto), acts AS (
    SELECT *, CASE type WHEN 'view' THEN 0 WHEN 'cart' THEN 1 WHEN 'purchase' THEN 2 END AS step FROM acted WHERE type IN ('view', 'cart', 'purchase') AND ts < $upto),
named AS (SELECT s.id, s.item, a.step FROM acts a JOIN slots s ON a.list_id = s.id AND a.item = s.item WHERE (s.who IS NULL OR s.who = a.who) AND a.ts - s.shown_at BETWEEN 0 AND $window),
loose AS (SELECT a.step, a.item, (SELECT s.id FROM slots s WHERE s.who = a.who AND s.item = a.item AND s.shown_at <= a.ts ORDER BY s.shown_at DESC, s.id DESC LIMIT 1) AS id, a.ts
          FROM acts a WHERE a.list_id IS NULL),
every AS (SELECT id, item, step FROM named UNION ALL
          SELECT l.id, l.item, l.step FROM loose l JOIN slots s ON s.id = l.id AND s.item = l.item WHERE l.ts - s.shown_at BETWEEN 0 AND $window)
SELECT s.id, s.item, coalesce(max(e.step) >= 0, false), coalesce(max(e.step) >= 1, false), coalesce(max(e.step) >= 2, false)
FROM slots s LEFT JOIN every e ON e.id = s.id AND e.item = s.item WHERE s.shown_at < $upto - $settle GROUP BY ALL ORDER BY ALL
"""


@settings(max_examples=40, deadline=None)
@given(lists=st.lists(LIST, max_size=6), events=st.lists(EVENT, max_size=12), asof=st.integers(1_050, 1_300))
def test_attribution_is_that_of_a_query_by_hand(lists: list, events: list, asof: int) -> None:
    impressions = pl.DataFrame([{RECOMMENDATION_ID: f"r{n}", USER_ID: user, TS: at, SLOTS: [{ITEM_ID: i, SCORE: 1.0, RANK: r, SOURCE: "x", PROPENSITY: 1.0} for r, i in enumerate(items, 1)]}
                                for n, (user, at, items) in enumerate(lists)], schema=IMPRESSIONS)
    log = pl.DataFrame([{EVENT_ID: f"e{n}", USER_ID: user, TS: at, KNOWN_TS: at, ITEM_ID: item, TYPE: type, RECOMMENDATION_ID: None if named is None else f"r{named}"}
                        for n, (user, at, item, type, named) in enumerate(events)], schema=EVENTS)
    found = gather(impressions.lazy(), log.lazy(), asof=asof, window_ms=WINDOW, settle_ms=SETTLE).slots.select(RECOMMENDATION_ID, ITEM_ID, *DID)
    shown = pl.DataFrame([(f"r{n}", user, at, i) for n, (user, at, items) in enumerate(lists) for i in items],
                         schema={"id": pl.String, "who": pl.String, "shown_at": pl.Int64, "item": pl.String}, orient="row").to_arrow()
    acted = log.select(pl.col(USER_ID).alias("who"), TS, pl.col(ITEM_ID).alias("item"), TYPE, pl.col(RECOMMENDATION_ID).alias("list_id")).to_arrow()
    with duckdb.connect() as db:
        db.register("shown", shown)
        db.register("acted", acted)
        expected = db.execute(BY_HAND, {"upto": asof, "window": WINDOW, "settle": SETTLE}).fetchall()
    assert sorted(found.rows()) == expected
