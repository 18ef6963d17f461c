"""Visits as feedback: what a list led to is not a visit's own, what is known is known before, and a shop that has shown nothing gets a ranker from them, or none where they say nothing."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.features import offline
from recsys.features.definitions import TABLES
from recsys.lake.tables import Lake
from recsys.models import recipes
from recsys.models.rankjudge import judge
from recsys.models.recipes import Recipe
from recsys.models.release import described
from recsys.ops.organic import engine_of, organic, visits
from recsys.prep.clean import clean, interactions, latest_items
from recsys.prep.vocab import Vocab
from recsys.schema import EVENT_ID, EVENTS, FEATURES, IMPRESSIONS, ITEM_ID, KNOWN_TS, RECOMMENDATION_ID, SEQ, SLOTS, TS, TYPE, USER_ID
from recsys.serving.wire import RecommendationRequest
from recsys.simulator import Size, World
from recsys.synth import DAY, MINUTE, T0
from recsys.training.feedback import DID, Feedback

START, END = T0 + 28 * DAY, T0 + 42 * DAY


def did(n: int, user: str, minute: int, item: str, type: str = "view", list: str | None = None) -> dict[str, object]:
    return {EVENT_ID: f"x{n}", USER_ID: user, ITEM_ID: item, TYPE: type, TS: T0 + minute * MINUTE, KNOWN_TS: T0 + minute * MINUTE, RECOMMENDATION_ID: list, SEQ: n}


def test_what_a_list_led_to_is_not_a_visits_own():
    log = pl.DataFrame([did(1, "ann", 10, "lamp"), did(2, "ann", 12, "pot", list="r1"), did(3, "ann", 14, "pot", "purchase"), did(4, "ann", 15, "lamp", "cart"),  # one visit
                        did(5, "ann", 80, "rake"), did(6, "bob", 11, "pot", list="r2"), did(7, "cyd", 5, "mug"), did(8, "cyd", 200, "mug")], schema=EVENTS)
    came = visits(log.lazy(), start=T0 + 6 * MINUTE, end=T0 + 100 * MINUTE)
    assert came.rows() == [("ann", T0 + 10 * MINUTE - 1, T0 + 10 * MINUTE, ["lamp", "pot"], [1, 2], [False, True]), ("ann", T0 + 80 * MINUTE - 1, T0 + 80 * MINUTE, ["rake"], [0], [False])]  # bob had nothing of his own, cyd came before and after
    assert visits(log.lazy(), start=T0, end=T0 + DAY, most=1)["items"].to_list() == [["mug"]]  # the latest
    assert visits(log.lazy(), start=T0, end=T0 + DAY, gap_ms=2 * DAY).height == 2


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, Lake, pl.DataFrame]:
    folder = tmp_path_factory.mktemp("organic")
    world, lake, tables = World(Size(shoppers=250, items=120, days=42), start_ms=T0), Lake(folder / "lake"), Lake(folder / "offline", tables=TABLES)
    log = pl.concat(world.events())
    newcomer = log.filter(pl.col(TYPE) == "view", pl.col(TS) > START + DAY).head(1).with_columns(pl.lit("newcomer").alias(USER_ID), pl.lit("own-1").alias(EVENT_ID))
    lake.append("events", pl.concat([log, newcomer]).sort(TS).with_columns(pl.int_range(1, pl.len() + 1, dtype=log.schema[SEQ]).alias(SEQ)))
    lake.append("items", world.items)
    offline.build(lake, tables, work=folder)
    return lake, tables, latest_items(lake.scan("items")).collect()


def walked(shop: tuple[Lake, Lake, pl.DataFrame], **more: Any) -> Feedback:
    lake, tables, items = shop
    events = clean(lake.scan("events"), asof=END)
    models = recipes.fit(Recipe("covisit"), interactions(events).filter(pl.col(TS) < START).collect(), asof=START, vocab=Vocab.build(items[ITEM_ID]))
    return organic(engine_of(list(models.values()), items, asof=START), events, tables.scan, start=START, end=END, **more)


def test_what_is_known_of_a_visit_was_known_before_it(shop: tuple[Lake, Lake, pl.DataFrame]):
    found = walked(shop)
    slots = found.slots
    mine = (slots[USER_ID] == "newcomer").to_numpy()
    assert mine.any() and slots.filter(mine)["viewed"].sum() == 1  # popular items are candidates of somebody new
    assert found.histories.filter(pl.col(RECOMMENDATION_ID) == slots.filter(mine)[RECOMMENDATION_ID][0])["items"].list.len().sum() == 0
    for name in ("user_events_30d", "user_views_1h", "user_category_events_7d"): assert (found.values[mine, found.names.index(name)] == 0).all(), name
    log = shop[0].scan("events").filter(pl.col(TYPE) == "view").collect()
    rng = np.random.default_rng(0)
    for n in rng.choice(len(slots), 40, replace=False):
        at, item, user = (slots[c][int(n)] for c in (TS, ITEM_ID, USER_ID))
        seen = log.filter(pl.col(TS).is_between(at - DAY, at, closed="right"))
        for name, of in (("item_views_1d", seen.filter(pl.col(ITEM_ID) == item)), ("user_views_1d", seen.filter(pl.col(USER_ID) == user))):
            served = found.values[n, found.names.index(name)]
            # a row holds until the next event of its key: what has left the window since is in it still
            assert served >= of.height and served <= log.filter(pl.col(TS).is_between(at - 60 * DAY, at), pl.col(ITEM_ID if name[0] == "i" else USER_ID) == (item if name[0] == "i" else user)).height, (name, n)
    for part in slots.partition_by(RECOMMENDATION_ID): assert part["viewed"].any() and part[TS].n_unique() == 1 and part["place"].is_sorted()


def test_what_a_visit_was_offered_is_no_candidate_and_what_was_shown_before_it_is_known(shop: tuple[Lake, Lake, pl.DataFrame]):
    plain = walked(shop)
    first = plain.slots[RECOMMENDATION_ID][0]
    visit = plain.slots.filter(pl.col(RECOMMENDATION_ID) == first)
    user, ts, left = visit[USER_ID][0], visit[TS][0], visit.filter(~pl.col("viewed"))[ITEM_ID].to_list()
    def shown(id: str, at: int, items: list[str], to: str = user) -> dict[str, Any]: return {RECOMMENDATION_ID: id, USER_ID: to, TS: at, SLOTS: [{ITEM_ID: item} for item in items], FEATURES: "{}"}
    lists = pl.DataFrame([shown("long-before", ts - 2 * DAY, left[:3]), shown("just-before", ts - 10 * MINUTE, left[3:5]), shown("another's", ts - MINUTE, left[5:6], "somebody"), shown("afterwards", ts + 3 * DAY, left[6:7])], schema_overrides={SLOTS: IMPRESSIONS[SLOTS]})
    found = walked(shop, impressions=lists.lazy())
    assert found.slots.filter(pl.col(RECOMMENDATION_ID) == first)[ITEM_ID].to_list() == [i for i in visit[ITEM_ID].to_list() if i not in left[3:5]]
    assert found.shown.filter(pl.col(RECOMMENDATION_ID) == first).select("items", "times").rows() == [(left[:5], [ts - 2 * DAY] * 3 + [ts - 10 * MINUTE] * 2)]
    opened = visit.filter(pl.col("viewed"))[ITEM_ID].to_list()
    taken = walked(shop, impressions=pl.DataFrame([shown("just-before", ts - MINUTE, opened)], schema_overrides={SLOTS: IMPRESSIONS[SLOTS]}).lazy())
    assert first not in taken.slots[RECOMMENDATION_ID]  # what it opened is the list's


def test_a_visit_counts_once_it_began_and_the_latest_stay(shop: tuple[Lake, Lake, pl.DataFrame]):
    few = walked(shop, most=20)
    assert 0 < len(few) <= 20 and few.slots[TS].min() > START and walked(shop, most=20).slots.equals(few.slots)


def test_a_ranker_that_only_visits_speak_for_and_one_they_do_not(shop: tuple[Lake, Lake, pl.DataFrame]):
    found, items = walked(shop), shop[2]
    vocab = Vocab.build(items[ITEM_ID])
    table, nothing = described(vocab, items), found.between(0, 0)
    good = judge(nothing, vocab, table, organic=found)
    assert good.promote and good.gain is None and good.visits is not None and good.visits.low > 0, good.why
    order = np.random.default_rng(1).permutation(found.slots.height)
    shuffled = Feedback(found.slots.with_columns(found.slots[name].gather(order).alias(name) for name in DID), found.values, found.names, found.service, found.histories, found.asof)
    luck = judge(nothing, vocab, table, organic=shuffled)
    assert not luck.promote and luck.why.endswith("which may be nothing")
    few = judge(nothing, vocab, table, organic=found.between(START, START + DAY))
    assert not few.promote and few.visits is None and few.why.startswith("0 lists were shown")
    assert {"visits", "drawn", "gain"} <= set(good.plain) and good.plain["visits"]["low"] > 0


def test_an_engine_that_knows_the_answers_is_refused(shop: tuple[Lake, Lake, pl.DataFrame], tmp_path: Path):
    lake, tables, items = shop
    events = clean(lake.scan("events"), asof=END)
    models = recipes.fit(Recipe("popular"), interactions(events).collect(), asof=END, vocab=Vocab.build(items[ITEM_ID]))
    with pytest.raises(ValueError, match="it would know the answers"): organic(engine_of(list(models.values()), items, asof=END), events, tables.scan, start=START, end=END)


def test_items_that_came_after_the_models_are_candidates_from_their_first_day(shop: tuple[Lake, Lake, pl.DataFrame]):
    lake, _, items = shop
    events = interactions(clean(lake.scan("events"), asof=END)).filter(pl.col(TS) < START).collect()
    known = Vocab.build(events[ITEM_ID])
    models = recipes.fit(Recipe("covisit"), events, asof=START, vocab=known)
    late = items.head(1).with_columns(pl.lit("brand-new").alias(ITEM_ID), pl.lit(START + 2 * DAY).alias("available_from"))
    engine = engine_of(list(models.values()), pl.concat([items, late]), asof=START)
    def found(now: int) -> bool: return "brand-new" in [s.item_id for s in engine.recommend(RecommendationRequest(items=[items[ITEM_ID][0]], k=60), None, now=now).slots]
    assert not found(START + DAY) and found(START + 3 * DAY)
