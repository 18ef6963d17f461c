"""The degradation ladder: every rung reached by breaking the thing under load, in a gateway that really runs; and whatever breaks, everybody gets an answer."""
from __future__ import annotations

import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from gateway_process import WORKER, Gateway, bundle, champion, running, wait_for

from recsys.features.store import open_store
from recsys.models.bundle import promote
from recsys.settings import Home, load

BREAKABLE = """
from dataclasses import replace
from functools import partial
import numpy as np
from recsys.serving.engine import Engine
class Ranker:
    "Keeps the order, until somebody breaks it."
    def rank(self, query, candidates, rows):
        if (home.path / "broken-ranker").exists(): raise FloatingPointError("overflow")
        return -np.arange(len(candidates), dtype=np.float32)
class Model:
    "The model inside, until somebody breaks it."
    def __init__(self, inner): self.inner = inner
    def __getattr__(self, name):
        if (home.path / "broken-model").exists(): raise FloatingPointError("overflow")
        return getattr(self.inner, name)
sound = Engine.load
def breakable(path, **more):
    engine = sound(path, **more)
    return replace(engine, models=(Model(engine.models[0]), *engine.models[1:]), ranker=Ranker())
Engine.load = staticmethod(breakable)
"""
PROGRAM = WORKER.replace("serve(home", BREAKABLE + "serve(home")
PATIENT = {"RECSYS_GATEWAY_MAX_WAIT_MS": "60000"}  # a busy machine is not what is tested here
REDIS = shutil.which("redis-server") or shutil.which("valkey-server")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("ladder") / "home", program=PROGRAM, **PATIENT) as gateway:
        assert gateway.events({"event_id": "1", "user_id": "gus", "item_id": "mug", "type": "view"}).status_code == 202
        yield gateway


def load_of(gateway: Gateway, *, clients: int = 3, each: int = 6, k: int = 4, **body: object) -> list[dict]:
    "The answers to a few clients at once; each must be a good one."
    def ask(_: int) -> list[dict]:
        with gateway.client() as client: found = [client.post("/v1/recommendations", json={"user_id": "gus", "k": k, **body}) for _ in range(each)]
        assert {f.status_code for f in found} == {200}, [f.text for f in found if f.status_code != 200]
        return [f.json() for f in found]
    with ThreadPoolExecutor(clients) as pool: answers = [answer for some in pool.map(ask, range(clients)) for answer in some]
    assert all(len(a["items"]) == k and a["age_ms"] >= 0 and all(s["propensity"] == 1.0 and s["reason"] for s in a["items"]) for a in answers)
    return answers


def tiers(answers: list[dict]) -> set[str]: return {a["tier"] for a in answers}
def slates(answers: list[dict]) -> set[tuple[str, ...]]: return {tuple(s["item_id"] for s in a["items"]) for a in answers}


def test_a_ranker_that_raises(gateway: Gateway):
    before, flag = load_of(gateway), gateway.home.path / "broken-ranker"
    flag.touch()
    try: during = load_of(gateway)
    finally: flag.unlink()
    assert tiers(before) == {"full"} and tiers(during) == {"without ranker"} and tiers(load_of(gateway)) == {"full"}
    assert slates(before) == slates(during), "retrieval's order stands"
    assert any(line["event"] == "ranker failed" and line["kind"] == "FloatingPointError" for line in gateway.log())


def test_models_that_raise_leave_the_last_list_of_the_same_place_and_else_what_everybody_wants(gateway: Gateway):
    before, flag = load_of(gateway), gateway.home.path / "broken-model"
    flag.touch()
    try: same, known, unknown, other = load_of(gateway), load_of(gateway, surface="basket"), load_of(gateway, user_id="nobody yet"), load_of(gateway, exclude=[before[0]["items"][0]["item_id"]])
    finally: flag.unlink()
    assert tiers(same) == {"full"} and slates(same) == slates(before), "the candidates of the same question are still known"
    assert tiers(known) == {"cached"} and slates(known) == slates(before) and tiers(unknown) == {"popular"} and tiers(load_of(gateway)) == {"full"}
    assert all(a["age_ms"] > 0 for a in unknown), "as old as the bundle"
    assert all(before[0]["items"][0]["item_id"] not in slate for slate in slates(other)), "a list of before is filtered for who gets it"
    assert {s["reason"] for a in known for s in a["items"] if s["source"] == "cached"} == {"because you viewed Mug"}


def test_a_history_that_cannot_be_read(gateway: Gateway):
    broken = sqlite3.connect(gateway.home.eventlog / "events.sqlite", timeout=20)
    try:
        broken.execute("ALTER TABLE packed RENAME TO packed_away")
        broken.commit()
        during = load_of(gateway, items=["spade"])
    finally:
        broken.execute("ALTER TABLE packed_away RENAME TO packed")
        broken.commit()
        broken.close()
    assert tiers(during) == {"without history"} and tiers(load_of(gateway)) == {"full"}
    assert all(a["age_ms"] > 0 for a in during) and {s["reason"] for a in during for s in a["items"]} & {"because you viewed Spade"}


def test_a_log_that_takes_nothing(gateway: Gateway):
    pid = gateway.workers[0].pid
    free = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, free[1]))  # as on a full disk
    try: during = load_of(gateway)
    finally: resource.prlimit(pid, resource.RLIMIT_FSIZE, free)
    assert tiers(during) == {"full"} and gateway.measured("recsys_impressions_unrecorded_total") >= len(during)


def test_a_bundle_that_is_gone(gateway: Gateway):
    serving = load_of(gateway)[0]["bundle"]
    place, aside = gateway.home.registry / "bundles" / serving, gateway.home.path / "aside"
    place.rename(aside)
    try:
        another = bundle(gateway.home, created=1_900_000_000_000)
        promote(gateway.home.registry, another, reason="test")
        wait_for(lambda: load_of(gateway, clients=1, each=1)[0]["bundle"] == another)
        shutil.rmtree(gateway.home.registry / "bundles" / another)
        during = load_of(gateway)
    finally: aside.rename(place)
    assert tiers(during) == {"full"} and {a["bundle"] for a in during} == {another} and gateway.get("/readyz").status_code == 200


def test_bundles_are_swapped_under_load_and_no_request_fails(gateway: Gateway):
    made = [bundle(gateway.home, created=1_900_000_000_001 + n) for n in range(3)]
    seen: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        for id in made:
            promote(gateway.home.registry, id, reason="test")
            asking = pool.submit(load_of, gateway)
            wait_for(lambda id=id: load_of(gateway, clients=1, each=1)[0]["bundle"] == id)
            seen += [a["bundle"] for a in asking.result()]
    assert set(seen) & set(made) and {a["bundle"] for a in load_of(gateway)} == {made[-1]}
    assert gateway.measured("recsys_bundle_refusals_total") == 0


def test_an_item_is_reachable_from_the_moment_it_was_put_and_a_price_counts_at_once(gateway: Gateway):
    from recsys.serving.auth import Keys
    keys = Keys(gateway.home.keys)
    key = keys.create(["items:write"], name="shop")
    keys.close()
    clay = {"item_id": "clay", "title": "Clay mug", "category": "home/tea", "price": 35.0, "in_stock": True}

    def put(**facts: object) -> None:
        with gateway.client() as client: assert client.put("/v1/items", json={"items": [{**clay, **facts}]}, headers={"Authorization": f"Bearer {key}"}).status_code == 202
    put()
    visitor = {"user_id": None, "items": ["mug"], "filters": {"in_stock": True}}
    assert all(any(s["item_id"] == "clay" and s["source"] == "new" and s["reason"] == "because you viewed Mug" for s in a["items"]) for a in load_of(gateway, **visitor))
    put(in_stock=False)
    assert not any("clay" in slate for slate in slates(load_of(gateway, **visitor)))
    promote(gateway.home.registry, champion(gateway.home, created=1_900_000_000_010), reason="test")  # and a change outlives the bundle
    put(in_stock=True, price=5.0)
    assert all("clay" in slate for slate in slates(load_of(gateway, **{**visitor, "filters": {"price": [None, 6.0]}, "k": 2})))


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([str(REDIS), "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "yes", "--appendfsync", "always", "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    def answers() -> bool:
        with socket.socket() as s: return s.connect_ex(("127.0.0.1", port)) == 0
    wait_for(answers)
    yield process, f"redis://127.0.0.1:{port}/0"
    process.kill()
    process.wait()


@pytest.mark.redis
def test_online_features_that_hang_and_a_redis_that_is_killed(redis: tuple[subprocess.Popen, str], tmp_path: Path):
    home = Home.open(tmp_path / "home")
    settings = load(home=home.path)
    open_store(home, replace(settings, features=replace(settings.features, online=redis[1])))  # features are promised
    with running(home.path, program=PROGRAM, **PATIENT, RECSYS_FEATURES_ONLINE=redis[1], RECSYS_EVENTLOG_URL=redis[1]) as gateway:
        wait_for(lambda: any(line["event"] == "feature store in place" for line in gateway.log()), seconds=180)  # Feast takes its time to be imported
        assert gateway.events({"event_id": "1", "user_id": "gus", "item_id": "mug", "type": "view"}).status_code == 202
        assert tiers(load_of(gateway)) == {"full"}
        redis[0].send_signal(signal.SIGSTOP)  # takes connections, says nothing
        try: hanging = load_of(gateway, items=["mug"])
        finally: redis[0].send_signal(signal.SIGCONT)
        wait_for(lambda: tiers(load_of(gateway, clients=1, each=1)) == {"full"})
        redis[0].kill()
        redis[0].wait()
        killed = load_of(gateway, items=["mug"])
    assert tiers(hanging) <= {"without features", "without history"} and tiers(killed) == {"without history"}
