"""The whole ring from one command: events in, recommendations out over HTTP, what happened back in the lake; and what breaks comes back."""
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import psutil
import pytest
from ports import free_port

from recsys.lake.tables import Lake
from recsys.lake.vault import Vault
from recsys.models import bundle
from recsys.schema import EVENT_ID, ITEM_ID, RECOMMENDATION_ID, USER_ID
from recsys.settings import Home

RECSYS = str(Path(sys.executable).parent / "recsys")
RUNS = Path(__file__).parents[1] / "reports" / "runs"
SMALL = ["--shoppers", "400", "--items", "150", "--days", "14"]


@pytest.fixture(scope="module", autouse=True)
def leave_no_runs_behind() -> Iterator[None]:
    "Executed notebooks of a checkout's flows go to reports/runs; those of these homes go with the tests."
    before = set(RUNS.glob("*"))
    yield
    for folder in set(RUNS.glob("*")) - before:
        if "pytest-of-" in json.loads((folder / "flow.json").read_text())["home"]: shutil.rmtree(folder)


def recsys(*argv: str, home: Path) -> tuple[int, dict[str, Any]]:
    "Run a command with --json; its exit code and its last line."
    done = subprocess.run([RECSYS, *argv, "--json"], capture_output=True, text=True, timeout=600, env={**os.environ, "RECSYS_HOME": str(home)})
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1])


class System:
    "A running `recsys up`: what it printed, and a client with the printed key."

    def __init__(self, home: Path, *argv: str):
        self.home, self.port, self.started = home, free_port(), time.monotonic()
        command = [RECSYS, "up", "--home", str(home), "--port", str(self.port), "--dashboard-port", str(free_port()), "--workers", "2", *argv]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.printed = ""
        for line in self.process.stdout:  # type: ignore[union-attr]
            self.printed += line
            if "curl " in line: break
        else: pytest.fail(f"recsys up ended: {self.process.stderr.read()}")  # type: ignore[union-attr]
        self.ready_s = time.monotonic() - self.started
        self.curl = next(line.strip() for line in self.printed.splitlines() if "curl " in line)
        key = re.search(r"Bearer (\S+?)['\"]", self.curl)
        assert key, self.printed
        self.key, self.url = key[1], f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60)

    def recommend(self, **body: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/recommendations", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def send(self, *events: dict[str, Any]) -> dict[str, Any]:
        answer = self.http.post("/v1/events", json={"events": list(events)})
        assert answer.status_code == 202, answer.text
        return answer.json()

    def children(self, name: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # gone since it was listed
                if ("-m voila" if name == "dashboard" else f"worker {name}") in " ".join(process.cmdline()): found.append(process)
        return found

    def stop(self) -> int:
        self.http.close()
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(180)
        _, alive = psutil.wait_procs(everyone, timeout=120)
        assert not alive, f"left running: {[p.cmdline() for p in alive]}"
        return code


@contextmanager
def system(home: Path, *argv: str) -> Iterator[System]:
    running = System(home, *argv)
    try: yield running
    finally:
        if running.process.poll() is None: assert running.stop() == 0


def within(question: Any, what: str, seconds: float = 180) -> Any:
    "The first true answer; fails when the time is over, which is long for the sake of busy machines."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if answer := question(): return answer
        time.sleep(0.1)
    pytest.fail(f"not within {seconds:g} s: {what}")


def turn_the_ring(running: System, user: str) -> None:
    "Recommendation -> click -> the next slate changes -> both are in the lake -> the receipt shows them."
    first = running.recommend(user_id=user, k=10)
    shown = [item["item_id"] for item in first["items"]]
    champion = bundle.champion(Home.open(running.home).registry)
    assert len(set(shown)) == 10 and first["bundle"] == champion.name
    assert first["tier"] == ("full" if bundle.manifest(champion).about["ranker"] else "retrieval")  # a first ranker comes from visits, where they speak for it
    clicked = shown[0]
    event = {"event_id": f"click-{first['recommendation_id']}", "user_id": user, "item_id": clicked, "type": "view", "recommendation_id": first["recommendation_id"]}
    assert running.send(event) == {"accepted": 1, "duplicates": 0, "rejected": []}
    assert running.send(event)["duplicates"] == 1
    after = [running.recommend(user_id=user, k=10) for _ in range(6)]  # whichever worker answers
    assert all(clicked not in [i["item_id"] for i in slate["items"]] for slate in after)
    assert all([i["item_id"] for i in slate["items"]] != shown for slate in after)
    lake = Lake(running.home / "lake")
    pseudonym = Vault.open(running.home / "keys").pseudonym(user)
    kept = within(lambda: lake.scan("events").filter(pl.col(EVENT_ID) == event["event_id"]).collect().to_dicts(), "the click in lake.events")
    assert [(e[USER_ID], e[ITEM_ID]) for e in kept] == [(pseudonym, clicked)]
    within(lambda: lake.scan("impressions").filter(pl.col(RECOMMENDATION_ID) == first["recommendation_id"]).collect().height == 1, "the impression in the lake")
    code, receipt = recsys("receipt", first["recommendation_id"], home=running.home)
    assert code == 0 and receipt["found_in"] == "lake" and [s["item_id"] for s in receipt["slots"]] == shown
    assert [a["item_id"] for a in receipt["answers"]] == [clicked]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with system(tmp_path_factory.mktemp("demo") / "home", "--demo", *SMALL) as running: yield running


def test_demo_turns(demo: System):
    turn_the_ring(demo, "shopper-00007")


def test_printed_curl_works(demo: System):
    answer = json.loads(subprocess.run(shlex.split(demo.curl), capture_output=True, text=True, check=True, timeout=120).stdout)
    assert len(answer["items"]) == 5


def test_a_new_key_works_at_once(demo: System):
    code, made = recsys("keys", "create", "--scopes", "recs:read", home=demo.home)
    bearer = {"Authorization": f"Bearer {made['key']}"}
    assert code == 0 and httpx.post(f"{demo.url}/v1/recommendations", json={"k": 3}, headers=bearer).status_code == 200
    assert httpx.post(f"{demo.url}/v1/events", json={"events": []}, headers=bearer).status_code == 403


def test_simulated_shoppers_keep_the_pages_alive(demo: System):
    lake = Lake(demo.home / "lake")
    within(lambda: lake.scan("events").filter(pl.col(RECOMMENDATION_ID).is_not_null() & ~pl.col(EVENT_ID).str.starts_with("click-")).collect().height > 0,
           "an event of the simulated shoppers")


def test_kill_9_of_every_gateway_loses_no_acknowledged_event(demo: System):
    acknowledged, stop = [], threading.Event()

    def post() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            event = {"event_id": f"kill-{n}", "user_id": "shopper-00001", "item_id": "item-00001", "type": "view"}
            try:
                if demo.http.post("/v1/events", json={"events": [event]}).status_code == 202: acknowledged.append(event["event_id"])
            except httpx.HTTPError: continue
    thread = threading.Thread(target=post)
    thread.start()
    for _ in range(3):
        before = len(acknowledged)
        within(lambda before=before: len(acknowledged) > before + 20, "events are acknowledged")
        for gateway in demo.children("gateway"): gateway.kill()
        within(lambda: len(demo.children("gateway")) == 2, "both gateways are back")
    before = len(acknowledged)
    within(lambda: len(acknowledged) > before + 20, "events are acknowledged after the last kill")
    stop.set()
    thread.join()
    lake = Lake(demo.home / "lake")

    def landed() -> pl.DataFrame: return lake.scan("events").filter(pl.col(EVENT_ID).str.starts_with("kill-")).select(EVENT_ID).collect()
    within(lambda: landed().height >= len(acknowledged), "all acknowledged events in the lake")
    assert landed()[EVENT_ID].n_unique() == landed().height and set(acknowledged) <= set(landed()[EVENT_ID])


def test_what_dies_comes_back(demo: System):
    for name in ("writer", "scheduler", "dashboard", "traffic"):
        [was] = within(lambda name=name: demo.children(name), name)
        was.kill()
        within(lambda name=name, was=was: [p for p in demo.children(name) if p.pid != was.pid], f"a new {name}")


def test_a_second_up_is_refused_in_one_line(demo: System):
    done = subprocess.run([RECSYS, "up", "--home", str(demo.home)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "another `recsys up`" in done.stderr


def test_busy_port_is_said_in_one_line(demo: System, tmp_path: Path):
    done = subprocess.run([RECSYS, "up", "--home", str(tmp_path), "--demo", "--port", str(demo.port)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and str(demo.port) in done.stderr and "--port" in done.stderr


def test_doctor_finds_the_running_system_well(demo: System):
    os.environ["RECSYS_GATEWAY_PORT"] = str(demo.port)
    try: code, found = recsys("doctor", home=demo.home)
    finally: del os.environ["RECSYS_GATEWAY_PORT"]
    states = {c["name"]: c["state"] for c in found["checks"]}
    assert code == 0 and states["gateway"] == states["champion"] == states["lake"] == "ok", found


def test_no_raw_user_id_in_any_log_or_store(demo: System):
    planted = "planted-user-4711"
    demo.send({"event_id": "planted", "user_id": planted, "item_id": "item-00001", "type": "view", "session_id": f"s-{planted}"})
    demo.recommend(user_id=planted)
    lake = Lake(demo.home / "lake")
    within(lambda: lake.scan("events").filter(pl.col(EVENT_ID) == "planted").collect().height, "the event in the lake")
    found = subprocess.run(["grep", "-rl", planted, str(demo.home)], capture_output=True, text=True).stdout
    assert found == ""


def test_second_start_keeps_the_champion_and_ctrl_c_stops_everything(demo: System):
    champion, runs, events = bundle.champion(demo.home / "registry").name, set(RUNS.glob("*")), Lake(demo.home / "lake").rows("events")
    assert demo.stop() == 0
    with system(demo.home, "--demo", *SMALL) as again:
        assert again.recommend(k=3)["bundle"] == champion
        assert set(RUNS.glob("*")) == runs and Lake(demo.home / "lake").rows("events") - events < 1000  # nothing was made or trained again


REAL = [("online-retail/online_retail.parquet", "online-retail", "17850"), ("rsc15-100k/yoochoose-clicks-100k_train_full.txt", "yoochoose", "3")]


@pytest.mark.real
@pytest.mark.parametrize(("file", "format", "user"), REAL, ids=[r[1] for r in REAL])
def test_real_data_turns_the_ring(file: str, format: str, user: str, data: Path, tmp_path: Path):
    home = tmp_path / "home"
    with system(home, "--data", str(data / file), "--format", format) as running:
        past = set(Lake(home / "lake").scan("events").filter(pl.col(USER_ID) == Vault.open(home / "keys").pseudonym(user)).collect()[ITEM_ID])
        assert past and not past & {i["item_id"] for i in running.recommend(user_id=user, k=10)["items"]}
        turn_the_ring(running, user)
    code, report = recsys("ingest", str(data / file), "--format", format, home=home)  # again: everything is a duplicate
    assert code == 0 and report["accepted"] == 0 and report["read"] == report["duplicates"] + report["quarantined"]
