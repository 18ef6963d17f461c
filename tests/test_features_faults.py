"""Bad input of features: what each answer is, and which counter says so, in both online stores, the item matrix and what a gateway asks."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from feature_home import home_of
from redis_process import RedisProcess

from recsys.breaker import Breaker
from recsys.features.definitions import ITEM_WINDOWS, RETRIEVAL_V1, TABLES, USER_WINDOWS, Service
from recsys.features.items import Layout, pack
from recsys.features.live import LiveFeatures
from recsys.features.matrix import Items
from recsys.features.online import Reader, _Counts, write_rows
from recsys.features.store import ONLINE, REGISTRY, open_store
from recsys.schema import ITEM_ID, TS, USER_ID
from recsys.settings import Home, Settings
from recsys.synth import DAY, HOUR, T0

TTL = USER_WINDOWS.ttl_ms or 0


@pytest.fixture
def server() -> Iterator[RedisProcess]:
    with RedisProcess(options=()) as server: yield server


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Home, Settings]:
    return home_of(tmp_path, "sqlite" if request.param == "sqlite" else request.getfixturevalue("server").url)


def user_row(user: str, ts: int, **values: object) -> pl.DataFrame:
    return pl.DataFrame([{**{f.name: f.default for f in USER_WINDOWS.features}, USER_ID: user, TS: ts, **values}], schema=USER_WINDOWS.table)


class Counted:
    "How much the counters of features rose since this was made."

    def __init__(self) -> None: self._before = self._now()

    def _now(self) -> dict[tuple[str, ...], float]:
        c = _Counts()
        return {s.labels.get("view", "") + ":" + s.labels.get("reason", "skewed"): s.value  # type: ignore[misc]
                for metric in (c.defaulted, c.skewed, c.unread) for m in metric.collect() for s in m.samples if s.name.endswith("_total")}

    def rose(self) -> dict[str, float]: return {k: v - self._before.get(k, 0) for k, v in self._now().items() if v != self._before.get(k, 0)}  # type: ignore[call-overload,misc]


def test_each_fault_of_a_row_has_its_answer_and_its_counter(place: tuple[Home, Settings]):
    store = open_store(*place)
    reader = Reader(store, ALL)
    write_rows(store, USER_WINDOWS, pl.concat([user_row("ann", T0, user_views_1d=4), user_row("bob", T0, user_carts_per_views_1d=float("nan"), user_views_1d=None)]))
    nothing = {**{f.name: f.default for f in USER_WINDOWS.features}, USER_WINDOWS.age: None}

    unknown = reader.user("nobody", now=T0)
    assert unknown is not None and (unknown.values, unknown.user_seq) == (nothing, None)

    seen = Counted()
    edge, stale = reader.user("ann", now=T0 + TTL), reader.user("ann", now=T0 + TTL + 1)
    assert edge is not None and edge.values["user_views_1d"] == 4 and edge.values[USER_WINDOWS.age] == TTL
    assert stale is not None and (stale.values, stale.user_seq) == (nothing, None) and seen.rose() == {"user_windows:stale": 1}

    seen = Counted()
    early = reader.user("ann", now=T0 - HOUR)
    assert early is not None and early.values["user_views_1d"] == 4 and early.values[USER_WINDOWS.age] == 0 and seen.rose() == {"user_windows:skewed": 1}

    gap = reader.user("bob", now=T0)
    assert gap is not None and gap.values["user_carts_per_views_1d"] is None and gap.values["user_views_1d"] == 0 and gap.user_seq == 0


def test_an_unknown_shopper_is_counted_as_one(place: tuple[Home, Settings]):
    reader, seen = Reader(open_store(*place), ALL), Counted()
    reader.user("nobody", now=T0)
    assert seen.rose() == {"user_windows:unknown": 1}


def test_nan_that_others_wrote_is_a_default_and_counted(place: tuple[Home, Settings]):
    "Feast's own push keeps a NaN and an infinity as they are."
    store = open_store(*place)
    at = pl.col(TS).cast(pl.Datetime("ms")).dt.replace_time_zone("UTC")
    row = user_row("ann", T0, user_carts_per_views_1d=float("nan"), user_carts_per_views_7d=float("inf"), user_views_1d=2)
    store.write_to_online_store(USER_WINDOWS.name, row.with_columns(at.alias("event_timestamp"), at.alias("created")).drop(TS).to_pandas())
    seen = Counted()
    found = Reader(store, ALL).user("ann", now=T0)
    assert found is not None and found.values["user_views_1d"] == 2
    assert found.values["user_carts_per_views_1d"] is None is found.values["user_carts_per_views_7d"] and seen.rose().get("user_windows:nan", 0) >= 1


ALL = Service("all", ((USER_WINDOWS, USER_WINDOWS.names),), "")


def test_items_unknown_stale_early_and_without_a_number(tmp_path: Path):
    names = ITEM_WINDOWS.names[:4]
    service = Service("bench", ((ITEM_WINDOWS, names),), "")
    zero = {n: 0.0 if TABLES[ITEM_WINDOWS.name][n] == pl.Float64 else 0 for n in ITEM_WINDOWS.names}
    rows = pl.DataFrame([{**zero, ITEM_ID: "mug", TS: T0, names[0]: 7}], schema=ITEM_WINDOWS.table).with_columns(pl.lit(float("nan")).alias(names[1]))
    items = Items(tmp_path / str(pack(tmp_path, Layout.of(service), {ITEM_WINDOWS.name: rows}, asof=T0)))
    nothing = np.array(items.layout.defaults, np.float32)
    ttl = ITEM_WINDOWS.ttl_ms or 0
    seen = Counted()
    found = items.rows(["mug", "no-such-item"], now=T0 + HOUR)
    assert found.values[0, 0] == 7 and np.array_equal(found.values[0, 1], nothing[1], equal_nan=True), "a NaN is as good as no value"
    assert np.array_equal(found.values[1], nothing, equal_nan=True) and found.age_ms[:, 0].tolist() == [HOUR, -1] and seen.rose() == {"items:unknown": 1}
    seen = Counted()
    assert items.rows(["mug"], now=T0 + ttl).values[0, 0] == 7 and np.array_equal(items.rows(["mug"], now=T0 + ttl + 1).values[0], nothing, equal_nan=True)
    assert items.rows(["mug"], now=T0 - DAY).age_ms.tolist() == [[0]] and seen.rose() == {"item_windows:stale": 1, "item_windows:skewed": 1}


@pytest.mark.redis
def test_a_redis_that_hangs_costs_a_second_and_then_nothing_until_it_is_back(server: RedisProcess, tmp_path: Path):
    home, settings = home_of(tmp_path, server.url)
    store = open_store(home, settings)
    write_rows(store, USER_WINDOWS, user_row("ann", T0, user_views_1d=4))
    now = 0.0
    reader = Reader(store, ALL, breaker=Breaker(failures=1, pause_s=0.5, clock=lambda: now))
    assert reader.user("ann", now=T0) is not None
    server.hang()  # it takes connections and says nothing
    try:
        seen, client = Counted(), store._get_provider().online_store._get_client(store.config.online_store)
        assert reader.user("ann", now=T0) is None and client.connection_pool.connection_kwargs["socket_timeout"] == 1.0
        assert seen.rose() == {":failed": 1}
        assert reader.user("ann", now=T0) is None and seen.rose()[":paused"] == 1
    finally: server.go_on()
    now = 0.6
    found = reader.user("ann", now=T0)
    assert found is not None and found.values["user_views_1d"] == 4


def test_an_online_file_that_is_gone_or_no_database_is_no_error_of_an_answer(tmp_path: Path):
    home, settings = home_of(tmp_path)
    open_store(home, settings)
    for spoil in (lambda f: f.unlink(), lambda f: f.write_bytes(b"no database at all " * 300)):
        for name in (f"{ONLINE}-wal", f"{ONLINE}-shm"): (home.features / name).unlink(missing_ok=True)
        spoil(home.features / ONLINE)
        reader, seen = Reader(open_store(home, settings, write=False), ALL), Counted()
        assert reader.user("ann", now=T0) is None and seen.rose() == {":failed": 1}


def test_a_gateway_says_what_is_missing_and_takes_the_store_when_it_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home, settings = home_of(tmp_path)
    live = LiveFeatures(home, settings, service=RETRIEVAL_V1)
    live.refresh()
    assert live.why is None and not live.used("ann", [], now=T0).missing, "no registry: nothing was promised"
    open_store(home, settings)
    assert (home.features / REGISTRY).exists()
    with monkeypatch.context() as other:  # definitions of another release
        other.setattr("recsys.features.store.digest", lambda *_: "0" * 16)
        live.refresh()
        assert live.why is not None and "recsys features apply" in live.why and live.used("ann", [], now=T0).missing
    monkeypatch.setattr(live._store, "_again", 0.0)
    live.refresh()
    assert live.why is None and not live.used("ann", [], now=T0).missing
