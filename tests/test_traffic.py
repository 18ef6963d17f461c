"""Simulated shoppers at a real gateway that goes away and comes back, and at things that are no gateway at all."""
from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from starlette.responses import PlainTextResponse, Response

from recsys.lake.eventlog import SQLiteEventLog
from recsys.lake.vault import Vault
from recsys.models import popular, release
from recsys.models.bundle import promote
from recsys.ops import traffic
from recsys.ops.traffic import Answer, Ask, Street, Tell, Unavailable, Wrong, run, visit
from recsys.prep.clean import interactions
from recsys.prep.vocab import Vocab
from recsys.schema import EVENT_ID, ITEM_ID, RECOMMENDATION_ID, TS, TYPE, USER_ID, VIEW
from recsys.serving.auth import Keys
from recsys.serving.gateway import create_app
from recsys.settings import Home, load
from recsys.simulator import Size, World
from recsys.synth import DAY
from recsys.telemetry import counter


@pytest.fixture(scope="module")
def world() -> World:
    return World(Size(shoppers=60, items=80, days=4), start_ms=time.time_ns() // 1_000_000 - 4 * DAY)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    "Shoppers who hardly pause, and no noise."
    monkeypatch.setattr(traffic, "visit", lambda *a, **k: hurried(visit(*a, **k)))
    logging.getLogger("recsys").addHandler(logging.NullHandler())


def hurried(steps: traffic.Visit) -> traffic.Visit:
    "The same visit, a hundred times as fast."
    answer = None
    while True:
        try: step = steps.send(answer)
        except StopIteration: return
        answer = yield step / 100 if isinstance(step, float) else step


@contextmanager
def serving(app: Callable, port: int = 0):
    "An ASGI app on a loopback port, in a thread; yields the port."
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try: yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(120)
        listener.close()


@contextmanager
def visited(port: int, key: str, world: World, **kw):
    "Traffic in a thread; yields a list that holds its counts when the block has ended."
    stop, out = threading.Event(), list[traffic.Counts]()
    thread = threading.Thread(target=lambda: out.append(run(f"http://127.0.0.1:{port}", key, world, stop=stop, **kw)))
    thread.start()
    try: yield out
    finally:
        stop.set()
        thread.join(120)
    assert out, "traffic did not end when it was told to"


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def test_live_shoppers_and_a_gateway_that_goes_away(tmp_path: Path, world: World):
    home, settings = Home.open(tmp_path / "home"), load({})
    rows = interactions(next(iter(world.events())).lazy()).collect()
    model = popular.fit(rows, asof=world.end_ms, vocab=Vocab(world.items[ITEM_ID]))
    about = {"created": world.end_ms, "data": {}, "metrics": {}, "settings": {}}
    promote(home.registry, release.write_bundle([model], world.items, registry=home.registry, about=about).name, reason="test")
    keys, log = Keys(home.keys), SQLiteEventLog(home.eventlog)
    key = keys.create(["events:write", "recs:read"], name="test")
    started = time.time_ns() // 1_000_000
    told = lambda: len(log.read("events", after=0, limit=10_000))  # noqa: E731
    with serving(create_app(home, settings)) as port:
        with visited(port, key, world, sessions_per_minute=1200) as out:
            wait_for(lambda: told() >= 20)
    unavailable = counter("recsys_traffic_requests_total", "", ("outcome",)).labels("unavailable")._value
    failed = unavailable.get()
    # the same port again, with the same shoppers, through a fault
    with visited(port, key, world, sessions_per_minute=1200, seed=1) as again:
        wait_for(lambda: unavailable.get() > failed)
        before = told()
        with serving(create_app(home, settings), port):
            wait_for(lambda: told() >= before + 20)
    events = [e for _, e in log.read("events", after=0, limit=10_000)]
    answers = {i[RECOMMENDATION_ID] for _, i in log.read("impressions", after=0, limit=10_000)}
    pseudonyms = {Vault.open(home.keys).pseudonym(world.shopper_id(n)) for n in range(world.size.shoppers)}
    log.close()
    keys.close()
    assert out[0].failures == out[0].left == 0 and again[0].failures >= 1
    assert out[0].told + again[0].told <= len(events) <= out[0].told + again[0].told + again[0].failures
    assert {e[USER_ID] for e in events} <= pseudonyms and len({e[EVENT_ID] for e in events}) == len(events)
    followed = [e for e in events if e.get(RECOMMENDATION_ID)]
    assert len(followed) > 5 and {e[RECOMMENDATION_ID] for e in followed} <= answers and {e[ITEM_ID] for e in events} <= set(world.items[ITEM_ID])
    assert all(started - 1 <= e[TS] <= time.time_ns() // 1_000_000 for e in events)


@pytest.mark.parametrize("answer", [
    Response(b"{}", 200, media_type="application/json"), PlainTextResponse("hello", 200), Response(b"\xff\x00", 200), PlainTextResponse("no", 401),
    PlainTextResponse("gone", 404), PlainTextResponse("oh", 500), Response(b'{"type":"x"}', 503), Response(b"", 204),
    Response(b'{"recommendation_id":"r","items":[{"item_id":"of another shop","score":1,"source":"s","reason":"r"}],"tier":"t","age_ms":0,"bundle":"b"}', 200),
], ids=lambda r: f"{r.status_code}-{r.body[:12]!r}")
def test_whatever_answers_traffic_goes_on_and_does_not_hammer(answer: Response, world: World):
    hits = list[float]()

    async def app(scope, receive, send):
        if scope["type"] == "http":
            hits.append(time.monotonic())
            await answer(scope, receive, send)
    with serving(app) as port, visited(port, "key", world, sessions_per_minute=600) as out:
        wait_for(lambda: len(hits) >= 2)
        time.sleep(0.2)  # for whoever would hammer
    assert out[0].sessions >= 1 and out[0].failures + out[0].asked >= 2
    if out[0].failures > 1: assert max(np.diff(hits)) >= traffic.FIRST_PAUSE_S - 0.05


class Counting:
    "A shop that always answers, and never with anything new."

    def __init__(self, world: World, fail: Exception | None = None): self.world, self.fail, self.told = world, fail, list[dict]()

    def recommend(self, user_id: str) -> Answer:
        if self.fail: raise self.fail
        return Answer("r", self.world.items[ITEM_ID].head(10).to_list())

    def send(self, event) -> None:
        if self.fail: raise self.fail
        self.told.append(dict(event))


@pytest.mark.parametrize("rate", [0, 0.5, 7, 90])
@pytest.mark.parametrize("fail", [None, Unavailable("down"), Wrong("no")])
def test_the_rate_is_never_exceeded(rate: float, fail: Exception | None, world: World):
    seconds, starts = world.end_ms / 1000, list[float]()
    street = Street(Counting(world, fail), world, sessions_per_minute=rate, now=lambda: seconds)
    end = seconds + 240
    while seconds < end:
        before = street.counts.sessions
        step = street.advance()
        starts += [seconds] * (street.counts.sessions - before)
        seconds += max(min(step, 60), 1e-3)
    assert len(starts) <= 1 + 4 * rate and (rate == 0) == (not starts)
    if len(starts) > 1: assert np.diff(starts).min() >= 60 / rate - 1e-6
    if not fail: assert len(starts) >= 0.9 * 4 * rate
    else: assert street.counts.failures <= 16


def test_a_step_that_fails_is_repeated_as_it_was(world: World):
    class Once(Counting):
        "Fails at the first try of each event, after it was stored."
        def send(self, event) -> None:
            again = any(e[EVENT_ID] == event[EVENT_ID] for e in self.told)
            self.told.append(dict(event))
            if not again: raise Unavailable("answer lost")
    seconds, shop = world.end_ms / 1000, Once(world)
    street = Street(shop, world, sessions_per_minute=6, now=lambda: seconds)
    while len(shop.told) < 30: seconds += max(min(street.advance(), 60), 1e-3)
    by_id: dict[str, list] = {}
    for e in shop.told[:-1]: by_id.setdefault(e[EVENT_ID], []).append(e)
    assert sum(len(v) == 2 for v in by_id.values()) > 10 and all(v[0] == v[-1] and len(v) <= 2 for v in by_id.values())


def test_a_visit_is_decided_by_its_seed(world: World):
    def told(seed: int) -> list:
        steps, out, answer = visit(world, 3, "s", now=lambda: world.end_ms, rng=np.random.default_rng(seed)), [], None
        while True:
            try: step = steps.send(answer)
            except StopIteration: return out
            out.append(step)
            answer = Answer("r", world.items[ITEM_ID].head(5).to_list()) if isinstance(step, Ask) else None
    assert told(4) == told(4) != told(5)
    views = [s.event for seed in range(30) for s in told(seed) if isinstance(s, Tell) and s.event[TYPE] == VIEW]
    assert {RECOMMENDATION_ID in v for v in views} == {True, False}
