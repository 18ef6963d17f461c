"""Parity finds what is planted: each fault that makes training and serving differ is reported by its feature, and honest serving never is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.features.definitions import CATALOGUE, ITEM_CATALOGUE, ITEM_WINDOWS, RETRIEVAL_V1, USER_WINDOWS, age_ms
from recsys.features.items import Layout, latest, pack
from recsys.features.matrix import Items
from recsys.features.parity import Parity, check
from recsys.features.record import noted
from recsys.lake.tables import Lake
from recsys.prep.windows import known_windows, windows
from recsys.schema import EVENTS, IMPRESSIONS
from recsys.synth import DAY, HOUR, MINUTE, T0, shop

ITEMS = ("mug", "pot", "tin")
Rows = Callable[[pl.LazyFrame], pl.DataFrame]


def honest(events: pl.LazyFrame) -> pl.DataFrame:
    return known_windows(events, key="user_id").collect()


@dataclass
class Shop:
    "A lake, an item matrix, and a server that answers from both as a real one would."

    root: Path
    lake: Lake
    impressions: list[dict[str, Any]] = field(default_factory=list)
    seq: int = 0

    def happen(self, *moments: tuple[str, str, str, int, int]) -> None:
        "Events (user, item, type, ts, known_ts) that come through the log."
        rows = []
        for user, item, type, ts, known in moments:
            self.seq += 1
            rows.append({"event_id": f"e{self.seq}", "user_id": user, "item_id": item, "type": type, "ts": ts, "known_ts": known,
                         "ts_is_order": False, "quantity": 1, "price": 2.5, "seq": self.seq})  # fmt: skip
        self.lake.append("events", pl.DataFrame(rows, schema=EVENTS))

    def events(self) -> pl.LazyFrame:
        return self.lake.scan("events")

    def pack(self, asof: int) -> Items:
        known = self.events().filter(pl.col("known_ts") <= asof)
        rows = {
            ITEM_WINDOWS.name: latest(known_windows(known, key="item_id", grid_ms=ITEM_WINDOWS.grid_ms), key="item_id", asof=asof),
            ITEM_CATALOGUE.name: latest(
                self.lake.scan("items").select("item_id", "ts", *(pl.col(c).alias(n) for n, c in CATALOGUE.items())), key="item_id", asof=asof
            ),
        }
        version = pack(self.root, Layout.of(RETRIEVAL_V1), rows, asof=asof, mark=known.select(pl.col("seq").max()).collect().item() or 0)
        return Items(self.root / str(version))

    def serve(self, user: str, now: int, matrix: Items, *, rows: Rows = honest, upto: int | None = None) -> dict[str, Any]:
        "Answer `user` at `now` from the events up to a place in the log; returns the features, which may be spoiled before `log`."
        mine = self.events().filter((pl.col("user_id") == user) & (pl.col("seq").fill_null(0) <= (self.seq if upto is None else upto)))
        found = rows(mine).to_dicts()
        row = found[-1] if found and USER_WINDOWS.fresh(now, found[-1]["ts"]) else None
        values = {f.name: f.value((row or {}).get("seq" if f.name == "user_seq" else f.name)) for f in RETRIEVAL_V1.features(keys=("user_id",))}
        values[USER_WINDOWS.age] = age_ms(now, row["ts"]) if row else None
        return noted("retrieval_v1", values, ITEMS, matrix.rows(list(ITEMS), now=now), Layout.of(RETRIEVAL_V1))

    def log(self, user: str | None, now: int, matrix: Items, features: dict[str, Any]) -> None:
        self.impressions.append(
            {
                "recommendation_id": f"r{len(self.impressions)}",
                "user_id": user,
                "ts": now,
                "items_version": matrix.version,
                "features": json.dumps(features),
            }
        )

    def check(self, **options: Any) -> Parity:
        self.lake.append("impressions", pl.DataFrame(self.impressions, schema=IMPRESSIONS))
        return check(self.lake, **options)


@pytest.fixture
def world(tmp_path: Path) -> Shop:
    "Nine days of the tiny shop, through the log."
    lake = Lake(tmp_path / "lake")
    lake.append("items", shop().items)
    made = Shop(tmp_path / "items", lake)
    made.happen(*shop().events.select("user_id", "item_id", "type", "ts", "known_ts").iter_rows())
    return made


NOW = T0 + 9 * DAY


def answers(world: Shop, matrix: Items, **options: Any) -> None:
    for n, user in enumerate(("ann", "bob", "gus", "nobody")):
        world.log(user, NOW + n, matrix, world.serve(user, NOW + n, matrix, **options))


def wrong(found: Parity) -> set[str]:
    return {name for name, (_, n) in found.features.items() if n}


def test_an_honest_server_is_never_reported(world: Shop):
    matrix = world.pack(NOW - HOUR)
    answers(world, matrix)
    world.happen(("ann", "tin", "view", NOW + 10, NOW + 10), ("bob", "mug", "purchase", NOW - DAY, NOW + 11))  # later news change nothing
    answers(world, matrix, upto=world.seq - 2)  # nor does a lag of moments
    found = world.check()
    assert found.ok and found.impressions == 8 and not found.skipped and not found.examples
    assert found.compared == 8 * (7 + 1 + 3 * (6 + 2)) == sum(n for n, _ in found.features.values())
    assert json.loads(json.dumps(found.json))["mismatches"] == 0


def test_a_closed_side_error(world: Shop):
    matrix = world.pack(NOW - HOUR)

    def closed_left(events: pl.LazyFrame) -> pl.DataFrame:
        return windows(events, key="user_id", closed="left").collect()

    answers(world, matrix, rows=closed_left)
    found = world.check()
    assert {"user_events_30d", "user_events_1h"} <= wrong(found) and "user_seq" not in wrong(found)
    assert found.features["user_events_30d"][1] == 3 and found.mismatches == sum(n for _, n in found.features.values())
    first = found.examples[0]
    assert first.lake - first.served == 1 and first.feature in str(first) and first.entity in str(first)


def test_a_late_event_put_where_it_happened(world: Shop):
    "It came a day late. A server that counts it in the hour of its arrival, or not at all, is wrong; one that counts it from then on is not."
    matrix, late = world.pack(NOW - HOUR), ("ann", "pot", "purchase", NOW - DAY, NOW - 5000)
    world.happen(late)

    def by_arrival(events: pl.LazyFrame) -> pl.DataFrame:
        return known_windows(events.with_columns(pl.col("known_ts").alias("ts")), key="user_id").collect()

    def ignored(events: pl.LazyFrame) -> pl.DataFrame:
        rows = known_windows(events.filter(pl.col("ts") == pl.col("known_ts")), key="user_id").collect()
        return rows.with_columns(pl.lit(world.seq).alias("seq"))

    for rows in (honest, by_arrival, ignored):
        world.log("ann", NOW, matrix, world.serve("ann", NOW, matrix, rows=rows))
    found = world.check()
    told = {m.recommendation_id for m in found.examples}
    assert told == {"r1", "r2"} and {"user_events_1h", "user_purchases_30d", USER_WINDOWS.age} <= wrong(found)


def test_a_late_event_in_the_items(world: Shop):
    matrix = world.pack(NOW - HOUR)
    features = world.serve("ann", NOW, matrix)
    world.log("ann", NOW, matrix, features)
    world.happen(("bob", "mug", "purchase", NOW - 2 * DAY, NOW - 5000))  # after the matrix
    assert world.check().ok
    world.impressions.clear()
    newer = world.pack(NOW + HOUR)
    world.log("ann", NOW + HOUR, newer, {**world.serve("ann", NOW + HOUR, newer), "items": features["items"]})  # the old rows under the new version
    found = world.check(since=NOW + HOUR)
    assert not found.ok and {"item_events_7d", "item_windows_age_ms"} <= wrong(found)


def test_a_stale_row(world: Shop):
    "A shopper came back two hours ago, and the row that is served has not heard of it; a moment's lag is none of that."
    matrix, before = world.pack(NOW - HOUR), world.seq
    world.happen(("ann", "pot", "view", NOW - 2 * HOUR, NOW - 2 * HOUR))
    world.log("ann", NOW, matrix, world.serve("ann", NOW, matrix, upto=before))
    world.log("ann", NOW - 2 * HOUR + 500, matrix, world.serve("ann", NOW - 2 * HOUR + 500, matrix, upto=before))
    found = world.check()
    assert wrong(found) == {"user_seq"} and [m.recommendation_id for m in found.examples] == ["r0"]
    assert f"{before + 1} or later" in str(found.examples[0]) and world.seq == before + 1


def test_a_row_beyond_its_time(world: Shop):
    matrix, much_later = world.pack(NOW - HOUR), NOW + 91 * DAY
    right = world.serve("ann", much_later, matrix)
    stale = world.serve("ann", NOW, matrix)
    assert right["user"]["user_events_30d"] == 0 and stale["user"]["user_events_30d"] > 0
    world.log("ann", much_later, matrix, right)
    world.log("ann", much_later, matrix, {**right, "user": stale["user"]})
    found = world.check()
    assert {m.recommendation_id for m in found.examples} == {"r1"} and "user_events_30d" in wrong(found)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("user", "user_events_30d", 999),
        ("user", "user_seq", 3),
        ("user", "user_seq", "12"),
        ("user", "user_views_1d", None),
        ("user", USER_WINDOWS.age, 0),
        ("mug", "item_price", 4.000001),
        ("mug", "item_in_stock", 0.0),
        ("pot", "item_purchases_per_views_30d", 0.25),
        ("tin", "item_windows_age_ms", None),
        ("tin", "item_events_7d", "0"),
    ],
)
def test_an_altered_value(world: Shop, part: str, name: str, value: Any):
    matrix = world.pack(NOW - HOUR)
    answers(world, matrix)
    kept = json.loads(world.impressions[0]["features"])
    row = kept["user"] if part == "user" else kept["items"][part]
    assert row[name] != value
    row[name] = value
    world.impressions[0]["features"] = json.dumps(kept)
    found = world.check()
    assert name in wrong(found) and {m.recommendation_id for m in found.examples} == {"r0"}
    if name != "user_seq":
        assert found.mismatches == 1 and found.examples[0].served == value


def test_a_value_that_is_left_out(world: Shop):
    matrix = world.pack(NOW - HOUR)
    features = world.serve("ann", NOW, matrix)
    del features["items"]["mug"]["item_price"]
    world.log("ann", NOW, matrix, features)
    found = world.check()
    assert found.mismatches == 1 and "not written down" in str(found.examples[0])


def test_what_cannot_be_compared_is_counted(world: Shop):
    matrix = world.pack(NOW - HOUR)
    features = world.serve("ann", NOW, matrix)
    world.log("ann", NOW, matrix, {})
    world.log("ann", NOW, matrix, {**features, "service": "ranker_v9"})
    world.log(None, NOW, matrix, {**features, "user": None})
    world.log("ann", NOW, matrix, {**features, "user": None, "items": None})
    world.log("ann", NOW, matrix, features)
    world.impressions[-1]["items_version"] = "b0b"
    world.impressions.append({"recommendation_id": "bare", "ts": NOW, "features": "{"})
    found = world.check()
    assert found.ok and found.impressions == 6 and found.skipped == {
        "no features written down": 1, "service ranker_v9 is not known": 1, "a visitor without a name": 1, "no row of a shopper": 1,
        "no rows of items": 1, "items_version 'b0b' names no time": 1, "service not JSON is not known": 1}  # fmt: skip


def test_bulk_data_counts_from_its_place_in_the_log(world: Shop):
    matrix = world.pack(NOW - HOUR)
    world.log("ann", NOW, matrix, world.serve("ann", NOW, matrix))
    world.seq += 1
    row = {"event_id": "old", "user_id": "ann", "item_id": "mug", "type": "view", "ts": NOW - 3 * DAY, "known_ts": NOW - 3 * DAY, "seq": world.seq}
    world.lake.append("events", pl.DataFrame([row, {**row, "event_id": "older"}], schema=EVENTS))
    assert world.check().ok  # served before it came
    world.impressions.clear()
    world.log("ann", NOW + 1, matrix, world.serve("ann", NOW + 1, matrix))
    assert world.check(since=NOW + 1).ok


def test_a_catalogue_row_that_came_later_is_late_and_not_wrong(world: Shop):
    matrix = world.pack(NOW - HOUR)
    world.log("ann", NOW, matrix, world.serve("ann", NOW, matrix))
    world.lake.append("items", shop().items.filter(pl.col("item_id") == "mug").with_columns(pl.lit(T0 + DAY).alias("ts"), pl.lit(9.0).alias("price")))
    found = world.check()
    assert found.ok and found.late == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_worlds(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    "Late events, clocks that run ahead, rows on one moment: the server that keeps rows as of a mark is right at every mark."
    folder = tmp_path_factory.mktemp("world")
    made = Shop(folder / "items", Lake(folder / "lake"))
    made.lake.append("items", shop().items)
    steps = data.draw(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(ITEMS), st.sampled_from(["view", "cart", "purchase"]),
                                         st.integers(-40 * 24 * 60, 60), st.integers(0, 40 * 24 * 60)), min_size=1, max_size=12))  # fmt: skip
    arrivals = sorted(steps, key=lambda s: s[4])
    made.happen(*((u, i, t, NOW + (known + off) * MINUTE, NOW + known * MINUTE) for u, i, t, off, known in arrivals))
    matrix = made.pack(NOW + data.draw(st.integers(0, 41 * 24 * 60)) * MINUTE)
    for n in range(4):
        upto = data.draw(st.integers(1, len(arrivals)))
        now = NOW + arrivals[upto - 1][4] * MINUTE + data.draw(st.integers(0, 5000))
        made.log("ab"[n % 2], now, matrix, made.serve("ab"[n % 2], now, matrix, upto=upto))
    found = made.check(lag_ms=1 << 50)
    assert found.ok, found.examples
