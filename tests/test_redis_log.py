"""The event log on Redis while the server is killed, hangs, is full, emptied, misconfigured, or behind TLS with few rights. (The contract itself: test_eventlog.)"""
from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from ports import free_port
from redis_process import DURABLE, RedisProcess, tls

from recsys.lake import redis_log
from recsys.lake.eventlog import EventLogError, GroupCommit, RedisEventLog, SQLiteEventLog, open_log
from recsys.lake.redis_server import PASSWORD, UnsafeAddress
from recsys.settings import Home, SettingsError, load

pytestmark = pytest.mark.redis
T0 = 1_767_225_600_000


def event(n: int | str, user: str = "ann", item: str | None = "mug", **more) -> dict:
    when = T0 + (n if isinstance(n, int) else 0)
    return {"event_id": f"e{n}", "user_id": user, "item_id": item, "type": "view", "ts": when, "known_ts": when, **more}


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisProcess]:
    with RedisProcess() as server: yield server


@pytest.fixture
def server(shared: RedisProcess) -> RedisProcess:
    "The module's server, as configured and empty."
    shared.ask("FLUSHALL")
    return shared


@pytest.fixture
def log(server: RedisProcess) -> Iterator[RedisEventLog]:
    log = RedisEventLog(server.url)
    yield log
    log.close()


def ids(log: RedisEventLog) -> list[str]:
    out: list[tuple[int, dict]] = []
    while rows := log.read("events", after=out[-1][0] if out else 0, limit=5000): out += rows
    return [row["event_id"] for _, row in out]


def until(holds) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_server_loses_no_acknowledged_event_doubles_none_and_is_taken_again():
    "kill -9 under the load of several gateways, three times; each sender repeats what was not acknowledged, as clients do."
    with RedisProcess() as server:
        logs = [RedisEventLog(server.url) for _ in range(3)]
        good: list[list[str]] = [[] for _ in logs]
        refused, stop = [0] * 3, threading.Event()

        def send(who: int) -> None:
            n = 0
            while not stop.is_set():
                batch = [event(f"{who}-{n}-{i}", f"u{i}", f"i{who}", ts=T0 + n) for i in range(20)]
                try: logs[who].append(batch)
                except EventLogError: refused[who] += 1; time.sleep(0.01); continue  # and again, the same events
                good[who] += [e["event_id"] for e in batch]
                n += 1
        threads = [threading.Thread(target=send, args=(who,)) for who in range(3)]
        for thread in threads: thread.start()
        for _ in range(3):
            before, failed = [len(g) for g in good], sum(refused)
            until(lambda before=before: all(len(g) > b + 100 for g, b in zip(good, before, strict=True)))
            server.stop()
            until(lambda failed=failed: sum(refused) > failed)
            server.start()
        stop.set()
        for thread in threads: thread.join()
        log = RedisEventLog(server.url)
        there, said = ids(log), {i for g in good for i in g}
        assert len(there) == len(set(there)) == log.depth("events", after=0) and said <= set(there) and len(set(there) - said) <= 3 * 20
        assert log.append([event("x") | {"event_id": i} for i in sorted(said)]).accepted == 0
        assert len(log.history("u3").item_ids) == min(200, len(there) // 20)


def test_a_hung_server_costs_a_moment_then_nothing_until_it_is_back(server: RedisProcess, log: RedisEventLog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(redis_log, "PATIENCE_S", 0.3)
    log = RedisEventLog(server.url)
    log.append([event(1)])
    assert log.history("ann").item_ids == ["mug"]
    server.hang()
    try:
        for _ in range(2):
            with pytest.raises(EventLogError, match="it hangs, or its disk does"): log.history("ann")
        for _ in range(1000):
            with pytest.raises(EventLogError, match="asked again soon"): log.history("ann")  # not one of them waited
        with pytest.raises(EventLogError, match="it hangs"): log.append([event(2)])
    finally: server.go_on()
    log._quick._breaker._until = 0  # type: ignore[union-attr]  the pause is over
    assert log.history("ann").item_ids[:1] == ["mug"]
    assert log.append([event(2), event(3)]).last_seq == 3 and sorted(ids(log)) == ["e1", "e2", "e3"]


def test_a_server_that_was_restarted_is_taken_again_at_once():
    with RedisProcess() as server:
        log = RedisEventLog(server.url)
        log.append([event(1)])
        assert log.history("ann").user_seq == 1
        server.stop()
        server.start()
        assert log.history("ann").user_seq == 1 and log.append([event(2)]).last_seq == 2


@pytest.mark.parametrize("options,rule", [((), "appendonly = no: must be yes"), (("--appendonly", "yes"), "appendfsync = everysec: must be always"),
                                          ((*DURABLE, "--maxmemory-policy", "allkeys-lru"), "maxmemory-policy = allkeys-lru: must not be")])
def test_a_server_that_may_forget_is_refused(options: tuple[str, ...], rule: str):
    with RedisProcess(options=options) as server:
        log = RedisEventLog(server.url)
        with pytest.raises(EventLogError, match=rule): log.append([event(1)])
        assert server.ask("DBSIZE") == 0


def test_a_server_that_came_back_forgetful_is_found_out():
    with RedisProcess() as server:
        log = RedisEventLog(server.url)
        log.append([event(1)])
        server.stop()
        server.options = ("--appendonly", "yes", "--appendfsync", "no")
        server.start()
        with pytest.raises(EventLogError, match="appendfsync = no: must be always"): log.append([event(2)])
        server.ask("CONFIG", "SET", "appendfsync", "always")
        assert log.append([event(2)]).accepted == 1


def test_an_emptied_server_is_not_taken_for_the_old_one(server: RedisProcess, log: RedisEventLog):
    log.append([event(n) for n in range(50)])
    name = log.identity("events")
    server.ask("FLUSHALL")
    with pytest.raises(EventLogError, match="the log that was here is gone"): log.append([event(99)])
    anew = RedisEventLog(server.url)  # the platform was started again
    anew.start_above(50)
    assert anew.append([event(99)]).last_seq == 51 and anew.identity("events") not in ("", name)
    with pytest.raises(EventLogError, match="OTHERLOG"): log.append([event(100)])


def test_a_full_server_says_so_stores_nothing_and_recovers(server: RedisProcess, log: RedisEventLog):
    log.append([event(0)])
    server.ask("CONFIG", "SET", "maxmemory", "1mb")
    try:
        with pytest.raises(EventLogError, match="give it more memory"): log.append([event(n, context="x" * 1000) for n in range(1, 900)])
        assert ids(log) == ["e0"] and log.history("ann").user_seq == 1
    finally: server.ask("CONFIG", "SET", "maxmemory", "0")
    assert log.append([event(n) for n in range(900)]).accepted == 899


def test_scripts_that_were_forgotten_are_sent_again(server: RedisProcess, log: RedisEventLog):
    log.append([event(0)])
    server.ask("SCRIPT", "FLUSH")
    with pytest.raises(EventLogError, match="it forgot the scripts"): log.append([event(1)])
    assert log.append([event(1)]).accepted == 1


def test_histories_are_folded_while_everybody_appends(server: RedisProcess):
    logs = [RedisEventLog(server.url, history=50) for _ in range(4)]
    past = pl.DataFrame([("ann", f"s{n}", "view", T0 - n) for n in range(30)], orient="row", schema=["user_id", "item_id", "type", "ts"])
    stop = threading.Event()

    def fold(log: RedisEventLog) -> None:
        while not stop.is_set(): log.pack(after=0, upto=10_000, least=1); log.seed(past)
    folding = [threading.Thread(target=fold, args=(log,)) for log in logs[:2]]
    adding = [threading.Thread(target=lambda k=k: [logs[k].append([event(f"{k}-{n}", item=f"i{k}", ts=T0 + n)]) for n in range(60)]) for k in (2, 3)]
    for thread in [*folding, *adding]: thread.start()
    for thread in adding: thread.join()
    stop.set()
    for thread in folding: thread.join()
    seen = RedisEventLog(server.url, history=200).history("ann")
    assert seen.user_seq == 120 and seen.ts[-50:] == sorted([T0 + n for n in range(35, 60)] * 2) and set(seen.item_ids[-50:]) == {"i2", "i3"}


def test_large_batches_are_one_trip_and_every_sender_gets_his_own_answer(log: RedisEventLog):
    async def go():
        group = GroupCommit(log)
        answers = await asyncio.gather(*(group.append([event(n) for n in range(700 * k, 700 * k + 900)]) for k in range(4)))
        group.close()
        return answers
    answers = asyncio.run(go())
    assert [(a.accepted, a.duplicates) for a in answers] == [(900, 0), *[(700, 200)] * 3] and log.depth("events", after=0) == 3000
    assert log.depth("events", after=2990) == 10 and log.reserve() == 3001 and log.depth("events", after=3001) == 0


# -- where it is

RIGHTS = "~{recsys}:* -@all +@read +@write +@scripting +@connection +config|get"


def test_one_setting_tls_and_a_user_of_few_rights(tmp_path: Path):
    port = free_port()
    home = Home.open(tmp_path / "home")
    settings = load({"RECSYS_EVENTLOG_URL": f"rediss://recsys@127.0.0.1:{port}/0?ssl_ca_certs={tmp_path / 'ca.pem'}", "RECSYS_EVENTLOG_HISTORY": "3"}, home=home.path)
    key = home.keys / PASSWORD
    key.touch(mode=0o600)
    key.write_text("s3:cret/@\n")
    with RedisProcess(options=(*DURABLE, *tls(tmp_path, port, f"recsys on >s3:cret/@ {RIGHTS}")), port=port):
        log = open_log(home, settings)
        assert log.append([event(n) for n in range(5)]).last_seq == 5 and log.history("ann").ts == [T0 + 2, T0 + 3, T0 + 4]
        log.record([{"recommendation_id": "r", "ts": T0}]); log.put([{"item_id": "mug", "ts": T0}])
        assert log.impression("r") and log.read("items", after=0, limit=9) == [(1, {"item_id": "mug", "ts": T0})]
        assert log.pack(after=0, upto=5, least=1) == 1 and log.trim("events", upto=5, before_ts=T0 + 3) == 3 and log.depth("events", after=4) == 1
        assert log.reserve() == 6 and log.trim("items", upto=1, before_ts=T0 * 2) == 0 and log.trim("impressions", upto=1, before_ts=T0 * 2) == 1
        log.start_above(9)
        key.write_text("wrong")
        with pytest.raises(EventLogError, match="<home>/keys/redis.password") as told: open_log(home, settings).append([event(9)])
        assert "wrong" not in str(told.value).replace("WRONGPASS", "") and "s3" not in str(told.value)


def test_where_it_may_be(tmp_path: Path):
    home = Home.open(tmp_path / "home")
    assert isinstance(open_log(home, load({}, home=home.path)), SQLiteEventLog)
    for url in ("redis://cache.example:6379/0", "rediss://cache.example:6379/0", "redis://:secret@10.0.0.7:6379/0"):
        with pytest.raises(UnsafeAddress, match=r"\[eventlog\] url = "): open_log(home, load({"RECSYS_EVENTLOG_URL": url}, home=home.path))
    with pytest.raises(SettingsError, match=r"\[eventlog\] url"): load({"RECSYS_EVENTLOG_URL": "kafka://x"}, home=home.path)
    absent = open_log(home, load({"RECSYS_EVENTLOG_URL": f"redis://127.0.0.1:{free_port()}/0"}, home=home.path))  # a gateway starts, and serves without
    with pytest.raises(EventLogError, match="start it, or correct the address"): absent.history("ann")
