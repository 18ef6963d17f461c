"""The writer: what the log acknowledged is in the lake once, wherever the writer dies and whatever breaks."""
from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from redis_process import RedisProcess

from recsys.lake.eventlog import EventLog, EventLogError, RedisEventLog, SQLiteEventLog
from recsys.lake.tables import Lake, LakeError
from recsys.ops.writer import Moved, Writer, mark_name, move, moved
from recsys.schema import QUARANTINE
from recsys.synth import DAY, T0, shop
from recsys.telemetry import exposition

EVENTS = shop().events.to_dicts()


@pytest.fixture
def log(tmp_path: Path):
    log = SQLiteEventLog(tmp_path / "log")
    yield log
    log.close()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    "Where a log is that may be either."
    if request.param == "sqlite": yield str(tmp_path / "log")
    else:
        with RedisProcess() as server: yield server.url


def opened(place: str) -> EventLog: return (RedisEventLog if "://" in place else SQLiteEventLog)(place)


@pytest.fixture
def lake(tmp_path: Path) -> Lake: return Lake(tmp_path / "lake")


def events(first: int, count: int, **more) -> list[dict]:
    return [{"event_id": f"e{n}", "user_id": f"u{n % 7}", "item_id": f"i{n % 5}", "type": "view", "ts": T0 + n, "known_ts": T0 + n, **more}
            for n in range(first, first + count)]


def shown(first: int, count: int) -> list[dict]: return [{"recommendation_id": f"r{n}", "ts": T0 + n, "slots": []} for n in range(first, first + count)]


def changed(first: int, count: int) -> list[dict]: return [{"item_id": f"i{n % 50}", "price": float(n), "ts": T0 + n} for n in range(first, first + count)]


def ids(lake: Lake, table: str = "events") -> list[str]:
    return sorted(lake.scan(table).collect()["event_id" if table == "events" else "recommendation_id"])


def metric(name: str, stream: str) -> float:
    return float(next(line for line in exposition().decode().splitlines() if line.startswith(f'{name}{{') and f'stream="{stream}"' in line).split()[-1])


# A writer that is killed at a chosen moment of its n-th move.
VICTIM = """
import os, signal, sys
from recsys.lake import tables
from recsys.lake.eventlog import RedisEventLog, SQLiteEventLog
from recsys.ops.writer import Writer
home, place, moment, times = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
log, lake = (RedisEventLog if "://" in place else SQLiteEventLog)(place), tables.Lake(home + "/lake")
def die_at(n, real, after):
    calls = []
    def call(*values, **more):
        calls.append(1)
        if len(calls) == n and not after: os.kill(os.getpid(), signal.SIGKILL)
        out = real(*values, **more)
        if len(calls) == n and after: os.kill(os.getpid(), signal.SIGKILL)
        return out
    return call
if moment == "before the commit": tables.write_deltalake = die_at(times, tables.write_deltalake, False)
if moment == "after the commit": tables.write_deltalake = die_at(times, tables.write_deltalake, True)
if moment == "before the trim": log.trim = die_at(times, log.trim, False)
if moment == "in the trim": log.pack = die_at(times, log.pack, True)
if moment == "in the compaction": tables.DeltaTable.optimize = property(lambda table: os.kill(os.getpid(), signal.SIGKILL))
writer = Writer(log, lake, batch_rows=40, compact_every=3, keep_days=0)
for n in range(14):
    writer.step()
    if n % 4 == 3: writer.tend()
"""


@pytest.mark.parametrize("place,moment,times", [
    ("sqlite", "before the commit", 4), ("sqlite", "after the commit", 4), ("sqlite", "before the trim", 1), ("sqlite", "in the trim", 2), ("sqlite", "in the compaction", 1),
    pytest.param("redis", "after the commit", 4, marks=pytest.mark.redis)], indirect=["place"])
def test_killed_at_any_moment_nothing_is_lost_or_doubled(place: str, lake: Lake, tmp_path: Path, moment: str, times: int):
    log = opened(place)
    log.append(events(0, 330)); log.record(shown(0, 330)); log.put(changed(0, 330))
    histories = {f"u{n}": log.history(f"u{n}") for n in range(7)}
    victim = subprocess.run([sys.executable, "-c", VICTIM, str(tmp_path), place, moment, str(times)], timeout=300)
    assert victim.returncode == -signal.SIGKILL
    log.append(events(330, 40))
    subprocess.run([sys.executable, "-c", VICTIM, str(tmp_path), place, "never", "0"], timeout=300, check=True)
    assert ids(lake) == sorted(f"e{n}" for n in range(370))
    assert ids(lake, "impressions") == sorted(f"r{n}" for n in range(330))
    assert lake.scan("items").collect()["price"].sort().to_list() == [float(n) for n in range(330)]
    assert log.depth("events", after=0) == 0 == log.depth("impressions", after=0) and [row["price"] for _, row in log.read("items", after=0, limit=99)] == list(range(280, 330))
    assert {user: log.history(user).item_ids[:40] for user in histories} == {user: h.item_ids[:40] for user, h in histories.items()}


def test_killed_again_and_again_while_events_come_in(log: SQLiteEventLog, lake: Lake, tmp_path: Path):
    code = """
import sys, threading
from recsys.lake.eventlog import SQLiteEventLog
from recsys.lake.tables import Lake
from recsys.ops.writer import Writer
print("up", flush=True)
Writer(SQLiteEventLog(sys.argv[1] + "/log"), Lake(sys.argv[1] + "/lake"), interval_ms=1, batch_rows=30, compact_every=5).run(threading.Event())
"""
    sent = 0
    for life in range(4):
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stdout.readline() == "up\n"
            until, before = time.monotonic() + 120, lake.rows("events")
            while lake.rows("events") < before + 50 * (life + 1) and time.monotonic() < until:  # it moves, while events come in
                log.append(events(sent, 20))
                sent += 20
            process.kill()
            assert lake.rows("events") > before
    writer = Writer(log, lake)
    while writer.step().events: pass
    assert ids(lake) == sorted(f"e{n}" for n in range(sent)) and lake.rows("events") == sent >= 500


def test_two_writers_at_once_move_each_record_once(log: SQLiteEventLog, lake: Lake, tmp_path: Path):
    log.append(events(0, 2000)); log.record(shown(0, 500))
    stop, logger = threading.Event(), logging.getLogger("writer")
    logger.setLevel("ERROR")
    writers = [Writer(SQLiteEventLog(tmp_path / "log"), Lake(lake.root), interval_ms=1, batch_rows=100, compact_every=3) for _ in range(3)]
    threads = [threading.Thread(target=w.run, args=(stop,), daemon=True) for w in writers]
    for thread in threads: thread.start()
    end = time.monotonic() + 180
    while (lake.rows("events") < 2000 or lake.rows("impressions") < 500) and time.monotonic() < end: time.sleep(0.05)
    stop.set()
    for thread in threads: thread.join()
    logger.setLevel("NOTSET")
    assert ids(lake) == sorted(f"e{n}" for n in range(2000)) and len(ids(lake, "impressions")) == 500


def test_what_went_in_is_what_comes_out(place: str, lake: Lake):
    log = opened(place)
    slots = [{"item_id": "чашка ☕", "score": 0.5, "rank": 1, "source": "popular", "propensity": 0.25}]
    log.append([*EVENTS, *events(0, 1, user_id="'; DROP TABLE events; --", context='{"page": "☕"}', price=0.1, ts_is_order=False)])
    log.record([{"recommendation_id": "r", "ts": T0, "slots": slots, "user_id": None, "features": "{}"}, {"recommendation_id": "s", "ts": T0}])
    item = {"item_id": "чашка ☕", "title": "a\0b", "price": 0.1, "in_stock": False, "attributes": '{"a": "☕"}', "ts": T0}
    log.put([item])
    writer = Writer(log, lake, clock=lambda: T0)
    assert writer.step() == Moved(24, 2, 1) and writer.step() == Moved(0, 0, 0)
    there = lake.scan("events").sort("seq").collect()
    assert there["seq"].to_list() == list(range(1, 25))
    assert there.head(23).drop("seq").sort("event_id").equals(shop().events.drop("seq").sort("event_id"))
    row = lake.scan("events").filter(pl.col("event_id") == "e0").collect().to_dicts()[0]
    assert row["user_id"] == "'; DROP TABLE events; --" and row["price"] == 0.1 and row["context"] == '{"page": "☕"}' and row["session_id"] is None
    assert lake.scan("impressions").sort("recommendation_id").collect()["slots"].to_list() == [slots, None]
    assert {k: v for k, v in lake.scan("items").collect().to_dicts()[0].items() if v is not None} == item


def test_a_new_log_beside_an_old_lake_is_not_taken_for_the_old_one(log: SQLiteEventLog, lake: Lake, tmp_path: Path):
    log.append(events(0, 50))
    assert move(log, lake, "events") == (50, 50)
    log.close()
    shutil.rmtree(tmp_path / "log")
    anew = SQLiteEventLog(tmp_path / "log")
    anew.append(events(100, 10))  # sequences 1 to 10 again
    assert moved(anew, lake, "events") == 0 and move(anew, lake, "events") == (10, 10) and lake.rows("events") == 60
    assert lake.mark("events", mark_name(anew, "events")) == 10


def test_a_log_restored_from_an_older_copy_is_found_out(log: SQLiteEventLog, lake: Lake, tmp_path: Path):
    log.append(events(0, 10))
    log.close()
    shutil.copytree(tmp_path / "log", tmp_path / "copy")
    log.append(events(10, 10))
    move(log, lake, "events")
    copy = SQLiteEventLog(tmp_path / "copy")
    copy.append(events(20, 5))
    with pytest.raises(EventLogError, match="lake has events up to 20 and the log ends at 15"): move(copy, lake, "events")


def test_a_broken_lake_costs_nothing_but_time(log: SQLiteEventLog, lake: Lake):
    "Its table is gone, then damaged, then back: events wait in the log, the metrics say so, and impressions go on."
    now = T0 + 60_000
    writer = Writer(log, lake, clock=lambda: now)
    log.append(events(0, 30))
    writer.step()
    table, aside = Path(lake.root, "events"), Path(lake.root, "aside")
    table.rename(aside)
    table.write_text("in the way")
    log.append(events(30, 20)); log.record(shown(0, 5))
    for _ in range(2):
        with pytest.raises(LakeError): writer.step()
    assert metric("recsys_writer_waiting_records", "events") == 20 and metric("recsys_writer_lag_seconds", "events") == pytest.approx(59.97)
    assert lake.rows("impressions") == 5 and metric("recsys_writer_waiting_records", "impressions") == 0
    table.unlink()
    aside.rename(table)
    assert writer.step() == Moved(20, 0, 0) and ids(lake) == sorted(f"e{n}" for n in range(50))
    assert metric("recsys_writer_waiting_records", "events") == 0 == metric("recsys_writer_lag_seconds", "events")


def test_a_lake_on_a_full_disk_catches_up(log: SQLiteEventLog, tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode: pytest.skip("mounting a small disk needs root")
    try:
        lake = Lake(small / "lake")
        writer = Writer(log, lake, batch_rows=500)
        log.append(events(0, 500))
        writer.step()
        ballast = small / "ballast"
        with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096) == 4096: pass
            raise OSError("the disk is full")
        log.append(events(500, 500))
        with pytest.raises(LakeError, match="has room"): writer.step()
        ballast.unlink()
        assert writer.step().events == 500 and ids(lake) == sorted(f"e{n}" for n in range(1000))
    finally: subprocess.run(["umount", "-l", str(small)], check=True)


def test_it_compacts_purges_and_lets_go(log: SQLiteEventLog, lake: Lake):
    now = T0 + DAY
    writer = Writer(log, lake, batch_rows=10, compact_every=10, keep_days=7, quarantine_days=30, clock=lambda: now)
    lake.append("quarantine", pl.DataFrame([{"origin": "f", "raw": b"x", "known_ts": T0 + n * DAY} for n in (0, 20)], schema=QUARANTINE))
    log.append(events(0, 200)); log.record(shown(0, 200))
    while writer.step().events: pass
    files = len(lake.dataset("events").files)
    assert files <= 10 < 20 and lake.rows("events") == 200 and log.depth("events", after=0) == 200 and lake.rows("quarantine") == 2
    now = T0 + 40 * DAY
    writer.step()
    assert log.depth("events", after=0) == 0 == log.depth("impressions", after=0) and lake.rows("quarantine") == 1
    assert len(log.history("u1").item_ids) == 29 and lake.rows("events") == 200 and len(lake.dataset("events").files) <= files


def test_what_the_lake_has_not_is_never_let_go(log: SQLiteEventLog, lake: Lake):
    log.append(events(0, 100))
    Writer(log, lake, batch_rows=30, keep_days=0, clock=lambda: T0 + 9 * DAY).step()
    assert lake.rows("events") == 30 and log.depth("events", after=0) == 70


def test_run_stops_when_told(log: SQLiteEventLog, lake: Lake):
    stop = threading.Event()
    thread = threading.Thread(target=Writer(log, lake, interval_ms=60_000).run, args=(stop,), daemon=True)
    log.append(events(0, 10))
    thread.start()
    end = time.monotonic() + 120
    while lake.rows("events") < 10 and time.monotonic() < end: time.sleep(0.02)
    stop.set()
    thread.join(timeout=120)
    assert not thread.is_alive() and lake.rows("events") == 10
