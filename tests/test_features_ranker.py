"""Every feature that a ranker reads, served from a real store and a real matrix: the log gives back the same floats, the lake proves each of them, and planted faults are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from feature_home import home_of

from recsys.features.definitions import RANKER_V1, TABLES
from recsys.features.live import LiveFeatures, packed
from recsys.features.offline import build
from recsys.features.parity import Parity, check
from recsys.features.record import logged
from recsys.features.store import ITEMS, OFFLINE
from recsys.features.updater import Updater
from recsys.lake.tables import Lake
from recsys.schema import EVENTS, IMPRESSIONS
from recsys.settings import Home, Settings
from recsys.synth import DAY, HOUR, T0, shop

NOW = T0 + 9 * DAY
SHOWN = ["mug", "rake", "lamp", "seeds"]


@dataclass
class Shop:
    home: Home
    settings: Settings
    lake: Lake
    offline: Lake
    live: LiveFeatures
    updater: Updater

    def happen(self, *moments: tuple[str, str, str, int, int]) -> None:
        "Events (user, item, type, ms, place) in the lake, and in the online rows."
        rows = [{"event_id": f"e{n}", "user_id": u, "item_id": i, "type": t, "ts": at, "known_ts": at, "ts_is_order": False, "seq": n} for u, i, t, at, n in moments]
        self.lake.append("events", pl.DataFrame(rows, schema=EVENTS))
        self.updater.step()

    def pack(self, asof: int) -> None:
        build(self.lake, self.offline)
        packed(self.lake, self.offline, self.home.features / ITEMS, RANKER_V1, asof=asof)
        self.live.refresh()

    def answer(self, id: str, user: str | None, now: int) -> dict[str, Any]:
        known = self.live.rows(user, [*SHOWN, "pot", "kettle"], now=now)
        used = known.used(SHOWN)
        assert np.array_equal(logged(json.loads(json.dumps(used.features)), SHOWN), known.values[: len(SHOWN)], equal_nan=True)
        return {"recommendation_id": id, "user_id": user, "ts": now, "items_version": used.items_version, "features": json.dumps(used.features)}

    def check(self, *impressions: dict[str, Any]) -> Parity:
        "A lake that has these impressions alone."

        class Seen:
            def scan(_, table: str) -> pl.LazyFrame:
                return pl.LazyFrame(impressions, schema=IMPRESSIONS) if table == "impressions" else self.lake.scan(table)

        return check(Seen())


@pytest.fixture
def world(tmp_path: Path) -> Shop:
    "Nine days of the tiny shop, through the log, in all stores."
    home, settings = home_of(tmp_path)
    lake, offline = Lake(home.lake), Lake(home.features / OFFLINE, tables=TABLES)
    events = shop().events
    lake.append("items", shop().items)
    lake.append("events", events.with_columns(pl.int_range(1, events.height + 1).alias("seq")).select(list(EVENTS)))
    updater = Updater.open(home, settings, lake, clock=lambda: NOW)
    made = Shop(home, settings, lake, offline, LiveFeatures(home, settings, service=RANKER_V1), updater)
    updater.step()
    made.pack(NOW - HOUR)
    return made


def spoiled(impression: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    kept = json.loads(impression["features"])
    change(kept)
    return {**impression, "features": json.dumps(kept)}


def wrong(found: Parity) -> dict[str, int]:
    return {name: n for name, (_, n) in found.features.items() if n}


def test_every_feature_is_compared_and_agrees(world: Shop):
    found = world.check(*(world.answer(f"r{n}", user, NOW + n) for n, user in enumerate(("ann", "bob", "gus", "nobody", None))))
    assert found.ok and found.late == 0, found.examples
    assert set(found.features) == {f.name for f in RANKER_V1.features()} | {v.age for v in RANKER_V1.views} | {"category"}
    assert found.features["user_category_events_7d"][0] == 4 * 3 and found.features["category_events_7d"][0] == 5 * len(SHOWN)


def test_the_features_say_something(world: Shop):
    known = world.live.rows("ann", ["mug", "lamp"], now=NOW)
    by_name = dict(zip(known.names, known.values.T.tolist(), strict=True))
    assert by_name["user_category_events_30d"][0] > by_name["user_category_events_30d"][1] == 0 and by_name["category_events_7d"][0] > by_name["category_events_7d"][1] == 0
    prices = dict(shop().items.select("item_id", "price").iter_rows())
    assert known.categories == ["home/tea", "home/light"] and by_name["item_price"] == [prices["mug"], prices["lamp"]] and known.values.shape == (2, len(RANKER_V1.inputs))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda k: k["pairs"]["home/tea"].update(user_category_events_30d=k["pairs"]["home/tea"]["user_category_events_30d"] + 1), {"user_category_events_30d": 1}),
        (lambda k: k["pairs"]["home/tea"].pop("user_category_events_7d"), {"user_category_events_7d": 1}),
        (lambda k: k["items"]["mug"].update(category_events_7d=99.0), {"category_events_7d": 1}),
        (lambda k: k["items"]["rake"].update(category_popularity_age_ms=1), {"category_popularity_age_ms": 1}),
        (lambda k: k["items"]["mug"].update(category="home/light"), {"category": 1}),
        (lambda k: k["items"]["lamp"].update(item_price=1.0), {"item_price": 1}),
        (lambda k: k["user"].update(user_carts_7d=77), {"user_carts_7d": 1}),
    ],
)
def test_an_altered_value_is_found(world: Shop, change: Callable[[dict[str, Any]], Any], expected: dict[str, int]):
    found = world.check(spoiled(world.answer("r0", "ann", NOW), change), world.answer("r1", "bob", NOW))
    assert wrong(found).items() >= expected.items() and found.late == 0
    if "category" not in expected: assert wrong(found) == expected


def test_rows_of_a_category_that_were_left_out_are_found(world: Shop):
    found = world.check(spoiled(world.answer("r0", "ann", NOW), lambda k: k["pairs"].pop("home/tea")))
    assert {"user_category_events_30d", "user_category_seq", "user_category_age_ms"} <= set(wrong(found))


def test_a_row_of_a_category_that_stands_still_is_found(world: Shop):
    "What was served a moment before the click was right then; ten minutes later it is not."
    before = world.answer("r0", "ann", NOW)
    world.happen(("ann", "mug", "view", NOW + 1, 100))
    after = world.answer("r1", "ann", NOW + 1000)
    assert world.check(before, after).ok
    stale = spoiled({**before, "ts": NOW + 600_000}, lambda k: [r.update({n: v + 600_000 for n, v in r.items() if n.endswith("age_ms") and v is not None}) for r in (k["user"], *k["pairs"].values(), *k["items"].values())])  # fmt: skip
    assert wrong(world.check(stale)) == {"user_seq": 1, "user_category_seq": 1}


def test_a_late_event_counts_from_when_it_was_known(world: Shop):
    world.lake.append("events", pl.DataFrame([{"event_id": "late", "user_id": "ann", "item_id": "mug", "type": "view", "ts": NOW - DAY, "known_ts": NOW - 5, "ts_is_order": False, "seq": 100}], schema=EVENTS))  # fmt: skip
    without = world.answer("r0", "ann", NOW)  # the row follows in a second: it does not have the event yet
    world.updater.step()
    having = world.answer("r1", "ann", NOW)
    assert json.loads(having["features"])["pairs"]["home/tea"]["user_category_seq"] == 100 and world.check(without, having).ok


def test_an_item_that_moved_is_told_from_a_fault(world: Shop):
    before = world.answer("r0", "ann", NOW)
    moved = shop().items.filter(pl.col("item_id") == "mug").with_columns(pl.lit("garden").alias("category"), pl.lit(NOW + HOUR).alias("ts"))
    world.lake.append("items", moved)
    late = world.check(before)
    assert late.ok and late.late > 0  # the catalogue has moved the mug since
    world.updater.step()
    still = world.answer("r1", "ann", NOW + 2 * HOUR)  # her rows are written again at her next event
    assert world.check(still).ok
    world.happen(("ann", "rake", "view", NOW + 2 * HOUR, 100))
    world.pack(NOW + 3 * HOUR)
    assert world.check(world.answer("r2", "ann", NOW + 3 * HOUR)).ok
    fault = spoiled(before, lambda k: k["pairs"]["home/tea"].update(user_category_events_30d=77))
    assert wrong(world.check(fault))["user_category_events_30d"] == 1


def test_without_a_matrix_or_a_store_there_are_defaults(world: Shop, tmp_path: Path):
    nothing = LiveFeatures(Home.open(tmp_path / "empty"), world.settings, service=RANKER_V1)
    nothing.refresh()
    known = nothing.rows("ann", SHOWN, now=NOW)
    defaults = np.array([np.nan if (d := RANKER_V1.missing()[n]) is None else d for n in known.names], np.float32)
    assert np.array_equal(known.values, np.tile(defaults, (len(SHOWN), 1)), equal_nan=True) and not known.missing and known.used(SHOWN).features == {}
    unknown = world.live.rows("nobody", ["no such item"], now=NOW)
    assert np.array_equal(unknown.values, defaults[None], equal_nan=True) and unknown.used(["no such item"]).features["items"]["no such item"]["category"] is None
    assert world.live.rows("ann", [], now=NOW).values.shape == (0, len(known.names))
    with pytest.raises(KeyError, match="tin"): world.live.rows("ann", SHOWN, now=NOW).used(["tin"])
