"""Telemetry where several things happen at once: requests side by side, threads, workers that come and go, hostile values."""
from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys import telemetry


@pytest.fixture
def log_file(tmp_path: Path):
    "Logs of this process go to a file; afterwards everything is as it was."
    root = logging.root
    before = list(root.handlers), root.level
    root.handlers = []
    file = tmp_path / "logs" / "test.log"
    telemetry.configure("test", file=file)
    yield file
    for handler in root.handlers: handler.close()
    root.handlers, root.level = before
    logging.captureWarnings(False)


def lines(file: Path) -> list[dict]: return [json.loads(line) for line in file.read_text().splitlines()]


def test_requests_served_at_the_same_time_keep_their_ids_apart(log_file: Path):
    log = telemetry.logger("test.apart")

    async def serve(n: int) -> None:
        with telemetry.bound(request_id=f"r{n}"):
            await asyncio.sleep(0)
            log.info("one", n=n)
            await asyncio.to_thread(log.info, "two", n=n)
        log.info("after", n=n)

    async def serve_all() -> None: await asyncio.gather(*[serve(n) for n in range(20)])
    asyncio.run(serve_all())
    written = lines(log_file)
    assert len(written) == 60
    assert all(w.get("request_id") == (None if w["event"] == "after" else f"r{w['n']}") for w in written)


def test_libraries_log_through_the_same_door(log_file: Path):
    theirs = logging.getLogger("uvicorn.test")
    theirs.addHandler(logging.StreamHandler(sys.stderr))
    theirs.propagate = False
    telemetry.configure("test", file=log_file)
    theirs.info("started on %s", "port", extra={"port": 8000})
    (line,) = lines(log_file)
    assert line["event"] == "started on port" and line["port"] == 8000 and line["logger"] == "uvicorn.test" and not theirs.handlers


def test_a_rotated_file_is_opened_again(log_file: Path):
    log = telemetry.logger("test.rotate")
    log.info("old")
    log_file.rename(log_file.with_suffix(".1"))
    log.info("new")
    assert [w["event"] for w in lines(log_file)] == ["new"]


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=8) | st.just(object) | st.just("\ud800"),
    lambda s: st.lists(s, max_size=3) | st.tuples(s, s), max_leaves=5), max_size=4))
def test_whatever_is_logged_is_one_line_of_json(fields: dict):
    line = telemetry._line(None, "", {"event": "x", **fields})
    assert "\n" not in line and isinstance(json.loads(line.encode()), dict)


def test_no_level_but_the_four():
    with pytest.raises(ValueError, match="'loud'.*must be one of debug, info, warning, error"): telemetry.configure("test", level="loud")


def test_threads_asking_at_once_get_one_metric():
    with ThreadPoolExecutor(16) as pool:
        gate = threading.Barrier(16)
        made = list(pool.map(lambda _: (gate.wait(), telemetry.counter("test_race_total", "x", ["a"]))[1], range(16)))
    assert len({id(m) for m in made}) == 1
    with pytest.raises(ValueError, match="test_race_total.*labels"): telemetry.counter("test_race_total", "x", ["b"])


CRASHES = """
import os, sys
from recsys.telemetry import counter, gauge
counter("test_done_total", "x").inc(); gauge("test_busy", "x").set(1)
print(os.getpid(), flush=True); os.kill(os.getpid(), 9)
"""
ASKS = "import sys; from recsys.telemetry import exposition, forget_process; [forget_process(int(p)) for p in sys.argv[1:]]; print(exposition().decode())"


def test_counts_of_a_killed_worker_remain_and_its_gauges_go(tmp_path: Path):
    env = os.environ | telemetry.shared_metrics(tmp_path / "metrics")
    run = lambda code, *args: subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True).stdout  # noqa: E731
    pids = [run(CRASHES).strip() for _ in range(2)]
    assert "test_busy 2.0" in run(ASKS)
    after = run(ASKS, *pids)
    assert "test_done_total 2.0" in after and "test_busy 1.0" not in after and "test_busy 2.0" not in after
    telemetry.shared_metrics(tmp_path / "metrics")
    assert "test_done_total" not in run(ASKS)


def test_what_is_tallied_by_many_threads_is_told_once():
    tally = telemetry.Tally(telemetry.counter("test_tally_total", "x", ["a"]))
    def work(n: int) -> None:
        for i in range(2000):
            tally.add("y")
            if i % 50 == n: telemetry.tell()
    with ThreadPoolExecutor(8) as pool: list(pool.map(work, range(8)))
    telemetry.tell()
    telemetry.tell()
    assert 'test_tally_total{a="y"} 16000.0' in telemetry.exposition().decode()


def test_lines_that_wait_in_a_loop_reach_the_file_whoever_writes_them(tmp_path: Path):
    before = list(logging.root.handlers), logging.root.level
    logging.root.handlers = []
    telemetry.configure("test", file=tmp_path / "log")
    def told() -> list[int]: return [json.loads(line)["n"] for line in (tmp_path / "log").read_text().splitlines()]
    async def ask(n: int, *, stay: bool) -> None:
        telemetry.line("recsys.access", "request", n=n)
        while stay and n not in told(): await asyncio.sleep(0.01)
    try:
        asyncio.run(ask(1, stay=False))  # a loop that ends with its line
        telemetry.line("recsys.access", "request", n=2)  # a thread without a loop
        assert told() == [1, 2]
        asyncio.run(ask(3, stay=True))
        with ThreadPoolExecutor(8) as pool: list(pool.map(lambda n: telemetry.line("recsys.access", "request", n=n), range(4, 200)))
        assert sorted(told()) == list(range(1, 200))
    finally:
        logging.root.handlers[0].close()
        logging.root.handlers, logging.root.level = before
