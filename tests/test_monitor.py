"""The monitor: the same numbers as a plain count, nothing lost while rows move, an answer whatever is missing or damaged."""
from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.lake.eventlog import SQLiteEventLog
from recsys.lake.tables import Lake
from recsys.models import bundle
from recsys.models.manifest import write
from recsys.ops import monitor, pages
from recsys.ops.writer import Writer, moved
from recsys.schema import (
    EVENT_ID,
    EVENT_TYPES,
    EVENTS,
    IMPRESSIONS,
    ITEM_ID,
    ITEMS,
    KNOWN_TS,
    LATENCY_US,
    QUARANTINE,
    RAW,
    RECOMMENDATION_ID,
    RULE,
    SLOTS,
    SOURCE,
    TIER,
    TITLE,
    TS,
    TYPE,
    USER_ID,
    VIEW,
)
from recsys.settings import Home

NOW = 1_767_229_200_000 + 12_345
MINUTE = 60_000
SECTIONS = (pages.header, pages.tiles, pages.traffic, pages.latency, pages.recommended, pages.answers, pages.fresh)


def event(n: int, at: int, **more) -> dict:
    return {EVENT_ID: f"e{n}", USER_ID: "a" * 32, ITEM_ID: "mug", TYPE: VIEW, TS: at, KNOWN_TS: at, **more}


def impression(n: int, at: int, **more) -> dict:
    return {RECOMMENDATION_ID: f"r{n}", TS: at, TIER: "full", LATENCY_US: 2000, SLOTS: [{ITEM_ID: "mug", SOURCE: "covisit"}], **more}


def frame(rows: list[dict], schema=EVENTS) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=schema)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.open(tmp_path / "home")


def read(home: Home, **more) -> monitor.Snapshot:
    return monitor.snapshot(home, now=NOW, runs=home.path / "runs", **more)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-90 * MINUTE, 5 * MINUTE), st.sampled_from(EVENT_TYPES))), st.integers(1, 70), st.integers(0, 59_999))
def test_traffic_counts_what_a_plain_loop_counts(rows, minutes, offset):
    now = NOW + offset
    found = monitor.traffic(frame([event(n, now + at, type=t) for n, (at, t) in enumerate(rows)]), now=now, window_ms=minutes * MINUTE)
    end = now // MINUTE * MINUTE
    plain = Counter(((now + at) // MINUTE * MINUTE, t) for at, t in rows if end - minutes * MINUTE <= now + at < end)
    assert found.height == minutes and found[TS].to_list() == list(range(end - minutes * MINUTE, end, MINUTE))
    assert {(r[TS], t): r[t] for r in found.iter_rows(named=True) for t in EVENT_TYPES if r[t]} == plain


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**8), min_size=1))
def test_every_latency_is_in_a_bar_and_quantiles_are_observed(values):
    found = monitor.latency(frame([impression(n, NOW, latency_us=v) for n, v in enumerate(values)], IMPRESSIONS))
    assert found is not None and sum(found.counts) == found.n == len(values) and len(found.edges) == len(found.counts) + 1
    assert {found.p50, found.p99, found.most} <= {v / 1000 for v in values} and found.most == max(values) / 1000
    assert sum(v / 1000 <= found.p99 for v in values) >= 0.99 * len(values)
    assert "<svg" in pages.histogram(found.edges, found.counts, {"p99": found.p99}, x_label="ms", y_label="n")


def test_nothing_is_lost_or_counted_twice_while_the_writer_moves_it(home: Home):
    log, lake = SQLiteEventLog(home.eventlog), Lake(home.lake)
    log.append([event(n, NOW - n) for n in range(400)])
    log.record([impression(n, NOW - n) for n in range(100)])
    writer = Writer(log, lake, batch_rows=40, clock=lambda: NOW)
    counts = set()
    mover = threading.Thread(target=lambda: [writer.step() for _ in range(11)])
    mover.start()
    while mover.is_alive() or not counts:
        counts |= {(stream, monitor.recent(stream, lake=lake, log=log, since=NOW - 1000).rows.height) for stream in ("events", "impressions")}
    mover.join()
    assert counts == {("events", 400), ("impressions", 100)} and moved(log, lake, "events") == 400
    after = monitor.recent("events", lake=lake, log=log, since=NOW - 1000)
    log.close()
    assert (after.waiting, after.oldest, after.in_lake, after.rows.height) == (0, None, NOW, 400)


def test_a_deep_log_is_read_from_its_end(home: Home):
    log, lake = SQLiteEventLog(home.eventlog), Lake(home.lake)
    log.append([event(n, NOW - 500 + n) for n in range(500)])
    found = monitor.recent("events", lake=lake, log=log, since=0, most=50)
    log.close()
    assert found.waiting == 500 and found.oldest == NOW - 500 and found.rows[EVENT_ID].to_list() == [f"e{n}" for n in range(450, 500)]


def test_an_empty_home_is_an_ordinary_state(home: Home):
    seen = read(home, gateway_url="http://127.0.0.1:9")
    page = "".join(section(seen) for section in SECTIONS)
    assert {p.name: p.state for p in seen.parts} == {"gateway": "down", "writer": "ok", "features": "none", "model": "none"}
    words = ("No impressions yet", "No events in this window yet", "no champion yet", "No record is in quarantine", "Connection refused")
    assert [word for word in words if word not in page] == []
    assert "NaN" not in page and "None" not in page


def test_reading_changes_nothing(home: Home):
    lake = Lake(home.lake)
    lake.append("events", frame([event(1, NOW)]))
    log = SQLiteEventLog(home.eventlog)
    log.append([event(2, NOW)])
    before = {t: lake.version(t) for t in ("events", "items", "impressions", "quarantine")}
    read(home)
    assert {t: lake.version(t) for t in before} == before and log.depth("events", after=0) == 1 and moved(log, lake, "events") == 0
    log.close()


def test_only_answers_to_shown_recommendations_count(home: Home):
    shown = frame([impression(n, NOW) for n in range(4)], IMPRESSIONS)
    events = frame([event(1, NOW, recommendation_id="r1"), event(2, NOW, recommendation_id="r1"), event(3, NOW, recommendation_id="of yesterday"),
                    event(4, NOW), event(5, NOW, recommendation_id="r2", type="dismiss")])
    found = monitor.click_through(shown, events)[VIEW]
    assert (found.n, found.of, found.rate) == (1, 4, 0.25) and found.low < 0.25 < found.high


def test_what_the_shop_writes_is_shown_as_text(home: Home):
    lake, evil = Lake(home.lake), "<img src=x onerror=alert(1)>\"'&"
    lake.append("items", frame([{ITEM_ID: evil, TITLE: evil, TS: 1}], ITEMS))
    lake.append("impressions", frame([impression(1, NOW, tier=evil, slots=[{ITEM_ID: evil, SOURCE: evil}])], IMPRESSIONS))
    lake.append("quarantine", frame([{RULE: evil, RAW: b"", KNOWN_TS: NOW}], QUARANTINE))
    page = "".join(section(read(home)) for section in SECTIONS)
    assert "<img" not in page and page.count("&lt;img") >= 5


def test_a_title_that_is_missing_or_changed(home: Home):
    lake = Lake(home.lake)
    lake.append("items", frame([{ITEM_ID: "mug", TITLE: "New", TS: 2}, {ITEM_ID: "mug", TITLE: "Old", TS: 1}], ITEMS))
    lake.append("impressions", frame([impression(1, NOW), impression(2, NOW, slots=[{ITEM_ID: "gone", SOURCE: "popular"}])], IMPRESSIONS))
    found = read(home).recommended
    assert dict(found.items.select(ITEM_ID, TITLE).iter_rows()) == {"mug": "New", "gone": None} and found.coverage == 1.0


def test_damage_to_the_registry_is_said_and_the_rest_is_shown(home: Home):
    made = write(home.registry, {"a": lambda p: p.write_text("a")}, about={"created": NOW - 1000, "model": "popular", "metrics": {}})
    bundle.promote(home.registry, made.name, reason="first", at=NOW)
    whole = read(home)
    assert whole.parts[-1].state == "ok" and whole.champion is not None and whole.champion.ndcg is None
    (made / "manifest.json").write_text("{}")
    assert "changed" in read(home).parts[-1].detail and read(home).parts[-1].state == "down"
    (home.registry / "champion.json").write_text("{")
    broken = read(home)
    assert broken.parts[-1].state == "down" and "champion.json" in broken.parts[-1].detail
    assert "no champion yet" in "".join(section(broken) for section in SECTIONS)


class _Answers(http.server.BaseHTTPRequestHandler):
    status, go_on = 200, threading.Event()

    def do_GET(self):
        self.go_on.wait(120)
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args): pass


@pytest.mark.parametrize(("status", "timeout", "state"), [(200, 60, "ok"), (503, 60, "late"), (200, 0.3, "down")])
def test_the_gateway_is_asked_and_not_waited_for(status, timeout, state):
    go_on = threading.Event()
    if state != "down": go_on.set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Answers,), {"status": status, "go_on": go_on}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: assert monitor.gateway(f"http://127.0.0.1:{server.server_port}", timeout=timeout).state == state
    finally:
        go_on.set()
        server.shutdown()
        server.server_close()


def test_the_monitor_never_imports_the_engine():
    code = "import sys, recsys.ops.monitor, recsys.ops.pages; print([m for m in sys.modules if m.startswith('recsys.serving') or m in ('torch', 'ipywidgets')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
