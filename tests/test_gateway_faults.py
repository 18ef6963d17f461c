"""What the gateway does when a part of it is broken: each thing is really broken, in a process that really runs."""
from __future__ import annotations

import asyncio
import resource
import sqlite3
import threading
import time
from pathlib import Path

import msgspec
import pytest
from gateway_process import Gateway, bundle, champion, running, wait_for

from recsys.lake.eventlog import SQLiteEventLog
from recsys.models import covisit, popular
from recsys.models.bundle import current, promote
from recsys.serving.http import ClientGone, read_body
from recsys.serving.problems import Refused


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory):
    with running(tmp_path_factory.mktemp("faults") / "home") as gateway: yield gateway


def event(event_id: str, user_id: str = "ann", item_id: str = "mug") -> dict:
    return {"event_id": event_id, "user_id": user_id, "item_id": item_id, "type": "view"}


def stored(gateway: Gateway) -> set[str]:
    log = SQLiteEventLog(gateway.home.eventlog)
    try: return {e["event_id"] for _, e in log.read("events", after=0, limit=1_000_000)}
    finally: log.close()


def test_an_event_log_that_cannot_be_written_acknowledges_nothing_and_recommends_on(gateway: Gateway):
    gateway.events(event("before", "full"))
    pid, free = gateway.workers[0].pid, resource.prlimit(gateway.workers[0].pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, free[1]))  # every write beyond 1 kB of a file fails, as on a full disk
    try:
        refused = gateway.events(event("during", "full"))
        answer = gateway.recommend(user_id="full", k=3)
    finally: resource.prlimit(pid, resource.RLIMIT_FSIZE, free)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0 and refused.json()["type"] == "/docs#log-unavailable"
    assert answer.status_code == 200 and answer.json()["tier"] == "retrieval" and len(answer.json()["items"]) == 3
    assert "during" not in stored(gateway)
    assert gateway.measured("recsys_impressions_unrecorded_total") >= 1 and gateway.measured("recsys_eventlog_failures_total") >= 1
    again = gateway.events(event("during", "full"))  # room again: the same event, no restart
    assert again.status_code == 202 and again.json()["accepted"] == 1 and {"before", "during"} <= stored(gateway)


def test_a_history_that_cannot_be_read_falls_to_the_next_rung(gateway: Gateway):
    gateway.events(event("h1", "hidden", "spade"))
    assert gateway.recommend(user_id="hidden").json()["tier"] == "retrieval"
    broken = sqlite3.connect(gateway.home.eventlog / "events.sqlite", timeout=20)
    try:
        broken.execute("ALTER TABLE packed RENAME TO packed_away")
        broken.commit()
        named, visitor = gateway.recommend(user_id="hidden", items=["mug"], k=3), gateway.recommend(items=["mug"], k=3)
    finally:
        broken.execute("ALTER TABLE packed_away RENAME TO packed")
        broken.commit()
        broken.close()
    assert named.status_code == 200 and named.json()["tier"] == "without history" and named.json()["age_ms"] > 0
    assert named.json()["items"][0]["reason"] == "because you viewed Mug" and visitor.json()["tier"] == "retrieval"  # a visitor has no history to miss
    assert gateway.recommend(user_id="hidden").json()["tier"] == "retrieval"
    assert gateway.measured("recsys_eventlog_failures_total") >= 1


def test_a_corrupt_champion_is_refused_and_the_old_one_stays(gateway: Gateway):
    serving = gateway.recommend().json()["bundle"]
    for n, spoil in enumerate(("cut", "changed", "gone")):
        bad = bundle(gateway.home, created=1_800_000_000_000 + n)
        file = gateway.home.registry / "bundles" / bad / "covisit" / "model.npz"
        sound = file.read_bytes()
        refusals = gateway.measured("recsys_bundle_refusals_total")
        if spoil == "gone": file.unlink()
        else: file.write_bytes(sound[: len(sound) // 2] if spoil == "cut" else sound[:-9] + b"x" + sound[-8:])
        point(gateway, bad)  # `promote` itself would refuse it
        wait_for(lambda refusals=refusals: gateway.measured("recsys_bundle_refusals_total") > refusals)
        answer = gateway.recommend(items=["mug"])
        assert answer.status_code == 200 and answer.json()["bundle"] == serving and gateway.get("/readyz").status_code == 200
        line = [x for x in gateway.log() if x["event"] == "bundle refused"][-1]
        assert "model.npz" in line["why"] and line["serving"] == serving
    promote(gateway.home.registry, serving, reason="back")


def point(gateway: Gateway, id: str) -> None:
    "Move the champion's pointer without looking at the bundle."
    pointer = gateway.home.registry / "champion.json"
    now = current(gateway.home.registry)
    beside = pointer.with_suffix(".tmp")
    beside.write_bytes(msgspec.json.encode(msgspec.structs.replace(now, number=now.number + 1, bundle=id, previous=(now.bundle, *now.previous))))
    beside.replace(pointer)


def test_a_spoilt_pointer_changes_nothing(gateway: Gateway):
    pointer = gateway.home.registry / "champion.json"
    sound, serving = pointer.read_bytes(), gateway.recommend().json()["bundle"]
    for text in (b"", b"{", b'{"bundle": "../../etc"}', b"\0" * 100):
        pointer.write_bytes(text)
        time.sleep(0.4)
        assert gateway.recommend().json()["bundle"] == serving
    pointer.unlink()
    time.sleep(0.4)
    assert gateway.recommend().json()["bundle"] == serving and gateway.get("/readyz").status_code == 200
    pointer.write_bytes(sound)


def test_a_bundle_without_a_floor_is_refused(tmp_path: Path):
    with running(tmp_path / "home", ready=False) as gateway:
        champion(gateway.home, which=(covisit,))
        wait_for(lambda: any(line["event"] == "bundle refused" for line in gateway.log()))
        assert gateway.get("/readyz").status_code == 503
        good = champion(gateway.home, which=(popular,))
        wait_for(lambda: gateway.get("/readyz").status_code == 200)
        assert gateway.recommend(items=["mug"]).json()["bundle"] == good


def test_a_lock_held_by_another_process_delays_and_does_not_lose(gateway: Gateway):
    other = sqlite3.connect(gateway.home.eventlog / "events.sqlite", timeout=20, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    answers: list[int] = []
    waiting = threading.Thread(target=lambda: answers.append(gateway.events(event("waited")).status_code))
    waiting.start()
    answer = gateway.recommend(user_id="ann", k=3)
    assert answer.status_code == 200 and answer.json()["tier"] == "retrieval" and answers == []  # reading does not wait, and neither does the loop
    other.execute("COMMIT")
    other.close()
    waiting.join()
    assert answers == [202] and "waited" in stored(gateway)


def test_keys_that_cannot_be_read_let_nobody_in(tmp_path: Path):
    with running(tmp_path / "home") as gateway:
        keys = sqlite3.connect(gateway.home.keys / "api-keys.db", timeout=20)
        keys.execute("ALTER TABLE keys RENAME TO keys_away")
        keys.commit()
        refused = gateway.recommend()
        assert refused.status_code == 503 and refused.json()["type"] == "/docs#keys-unavailable"
        keys.execute("ALTER TABLE keys_away RENAME TO keys")
        keys.commit()
        keys.close()
        assert gateway.recommend().status_code == 200


def test_a_slow_or_vanishing_sender_is_let_go():
    async def slow() -> dict:
        await asyncio.sleep(5)
        return {}

    async def gone() -> dict: return {"type": "http.disconnect"}
    with pytest.raises(Refused) as told: asyncio.run(read_body(slow, {}, most=10, seconds=0.05))
    assert told.value.name == "too-slow"
    with pytest.raises(ClientGone): asyncio.run(read_body(gone, {}, most=10))
