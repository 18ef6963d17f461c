"""The page as a person sees it: real Voila, real Chromium, no internet, and the lake's own numbers."""
from __future__ import annotations

import http.server
import math
import os
import random
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import polars as pl
import psutil
import pytest
from ports import free_port

from recsys.lake.eventlog import SQLiteEventLog
from recsys.lake.tables import Lake
from recsys.models import bundle
from recsys.models.manifest import write
from recsys.ops import pages
from recsys.ops.writer import Writer
from recsys.schema import (
    CART,
    EVENT_ID,
    IMPRESSIONS,
    ITEM_ID,
    ITEMS,
    KNOWN_TS,
    LATENCY_US,
    PURCHASE,
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
from recsys.settings import Home, Settings, load, root

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync")
MINUTE = 60_000
EVIL = "<img src=x onerror=\"window.pwned=1\">"


class Ready(http.server.BaseHTTPRequestHandler):
    "Stands in for the gateway's /readyz: the page asks it nothing else."

    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *args): pass


class Voila:
    "The dashboard of a home, as the supervisor would start it."

    def __init__(self, home: Home, settings: Settings):
        self.home, self.settings, self.process = home, settings, None

    def start(self) -> None:
        argv, env = pages.command(self.home, self.settings)
        with (self.home.logs / "dashboard.log").open("ab") as log:
            self.process = subprocess.Popen(argv, env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 180
        while time.monotonic() < until:
            try: return void(httpx.get(f"{self.url}/login", timeout=5, trust_env=False))
            except httpx.HTTPError: time.sleep(0.1)
        raise AssertionError((self.home.logs / "dashboard.log").read_text())

    @property
    def url(self) -> str: return f"http://{self.settings.dashboard.host}:{self.settings.dashboard.port}"

    def stop(self) -> None:
        kernels = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        assert self.process.wait(60) in (0, -signal.SIGTERM)
        gone, alive = psutil.wait_procs(kernels, timeout=60)
        for kernel in alive: kernel.kill()
        assert not alive, "the dashboard left kernels behind"


def percent(share: float) -> str: return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


def void(_: object) -> None: return None


@pytest.fixture(scope="module")
def gateway() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def voila(tmp_path_factory: pytest.TempPathFactory, gateway) -> Iterator[Voila]:
    home, usual = Home.open(tmp_path_factory.mktemp("dashboard") / "home"), load({})
    served = Voila(home, replace(usual, dashboard=replace(usual.dashboard, port=free_port(), refresh_s=1),
                                 gateway=replace(usual.gateway, port=gateway.server_port)))
    served.start()
    yield served
    served.stop()


@pytest.fixture(scope="module")
def context() -> Iterator:
    if not Path(CHROMIUM).exists():
        if os.environ.get("CI") == "true": pytest.fail(f"{CHROMIUM} is not installed; CI must not skip this")
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        made = browser.new_context(viewport={"width": 1400, "height": 900})
        made.set_default_timeout(120_000)
        yield made
        browser.close()


class Visit:
    "A page that may reach nothing but this machine, and what it said."

    def __init__(self, context, url: str):
        self.page, self.abroad, self.errors = context.new_page(), [], []
        self.page.route(lambda address: not address.startswith(("http://127.0.0.1:", "data:", "blob:")), self._refuse)
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("websocket", lambda w: None if w.url.startswith("ws://127.0.0.1:") else self.abroad.append(w.url))
        self.page.goto(url)

    def _refuse(self, route) -> None:
        self.abroad.append(route.request.url)
        route.abort()

    def text(self, key: str) -> str: return self.page.locator(f'[data-key="{key}"]').first.inner_text()

    def note(self, key: str) -> str: return self.page.locator(f'.tile:has([data-key="{key}"]) .note').inner_text()

    def wait(self, key: str, part: str, seconds: float = 120) -> str:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.page.locator(f'[data-key="{key}"]')
            if found.count() and part in (said := found.first.inner_text()): return said
            self.page.wait_for_timeout(100)
        raise AssertionError(f"{key} never said {part!r}: {self.page.locator('body').inner_text()[:2000]}")


@pytest.fixture(scope="module")
def visit(voila: Voila, context) -> Visit: return Visit(context, pages.url(voila.home, voila.settings))


def test_without_the_token_there_is_no_page_and_no_kernel(voila: Voila):
    with httpx.Client(base_url=voila.url, trust_env=False, timeout=60) as client:
        for path in ("/", "/?token=wrong"):
            answer = client.get(path)
            assert answer.status_code == 302 and "/login" in answer.headers["location"]
        assert client.get("/api/kernels/00000000-0000-0000-0000-000000000000").status_code in (302, 403)
        assert client.get("/voila/files/operations.ipynb").status_code in (302, 403, 404)
        secret = client.get("/", params={"token": pages.token(voila.home)})
    assert secret.status_code == 200 and "cdn" not in secret.text.lower()
    assert "default-src 'self'" in secret.headers["content-security-policy"]
    config = voila.home.run / "dashboard" / "voila.json"
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in (config, voila.home.keys / "dashboard.token"))
    assert not any(pages.token(voila.home) in part for part in psutil.Process(voila.process.pid).cmdline())


def test_it_listens_on_loopback_only(voila: Voila):
    listening = [c.laddr.ip for c in psutil.Process(voila.process.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening and set(listening) <= {"127.0.0.1"}


def test_an_empty_platform_says_so(visit: Visit):
    visit.wait("part-gateway", "up")
    body = visit.page.locator("body").inner_text()
    for word in ("No impressions yet", "No events in this window yet", "no champion yet", "No record is in quarantine"): assert word in body
    assert visit.text("part-model").replace("\n", "").endswith("not yet")


def test_numbers_on_the_page_are_those_of_the_lake(voila: Voila, visit: Visit):
    visit.page.evaluate("window.stayed = true")  # lost if the page were loaded again
    fill(voila.home, now=time.time_ns() // 1_000_000)
    lake = Lake(voila.home.lake)
    events, shown = lake.scan("events").collect(), lake.scan("impressions").collect()
    clicked = events.filter((pl.col(TYPE) == VIEW) & pl.col(RECOMMENDATION_ID).is_not_null())[RECOMMENDATION_ID].n_unique()
    visit.wait("answered-0", str(clicked))
    visit.page.get_by_text(f"{shown.height:,} in the last").wait_for()
    visit.wait("lag", "none")
    ms, slots = sorted(shown[LATENCY_US] / 1000), shown.explode(SLOTS).unnest(SLOTS)
    assert float(visit.text("p50").removesuffix("ms")) == pytest.approx(ms[len(ms) // 2], abs=0.006)
    assert f"{events.height:,} in the lake" == visit.note("events")
    assert f"{shown.height:,} in the last" in visit.note("requests")
    top = slots.group_by(ITEM_ID).len().sort("len", descending=True).row(0)
    assert visit.text("item-0") == percent(top[1] / slots.height)
    assert visit.text("ctr") == percent(clicked / shown.height)
    assert visit.text("coverage") == percent(slots[ITEM_ID].n_unique() / lake.rows("items"))
    assert visit.text("tier-full").endswith(percent((shown[TIER] == "full").mean()))
    assert visit.text("ndcg") == "0.124" and "0.118 to 0.131" in visit.note("ndcg") and "covisit" in visit.note("age")
    assert visit.text("refused-0") == "3" and visit.text("lag") == "none"
    drawn = visit.page.locator(".traffic svg .hover title").all_text_contents()
    minutes = dict(events[KNOWN_TS].cast(pl.Datetime("ms")).dt.strftime("%H:%M").value_counts().iter_rows())
    counted = {title[:5]: sum(int(line.split(": ")[1]) for line in title.split("\n")[1:]) for title in drawn}
    assert len(counted) == 60 and sum(counted.values()) > 1000
    assert counted == {minute: minutes.get(minute, 0) for minute in counted}


def test_it_follows_without_loading_again(voila: Voila, visit: Visit):
    now = time.time_ns() // 1_000_000
    before = Lake(voila.home.lake).rows("events")
    with_log(voila.home, lambda log: log.append([event(f"late{n}", now) for n in range(7)]))
    visit.wait("lag", "s")  # in the log, not yet in the lake
    move(voila.home)
    visit.wait("lag", "none")
    assert visit.note("events") == f"{before + 7:,} in the lake"
    assert visit.page.evaluate("window.stayed") is True


def test_it_is_legible_and_stays_on_this_machine(visit: Visit):
    folder = root() / "reports" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    visit.page.screenshot(path=folder / "operations.png")
    texts = "[...document.querySelectorAll('.tile .value, .tile .label, .tile .note, h2, th')]"
    clipped, page = f"{texts}.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)", "document.documentElement"
    for _ in range(100):  # a page that is just being drawn anew settles
        width, height, cut = visit.page.evaluate(f"[{page}.scrollWidth, {page}.scrollHeight, {clipped}]")
        if width <= 1400 and height <= 930 and cut == []: break
        visit.page.wait_for_timeout(100)
    assert width <= 1400 and height <= 930 and cut == []
    assert visit.page.evaluate("window.pwned") is None and EVIL in visit.page.locator("body").inner_text()
    assert visit.page.title() == "Recommendations · operations"
    assert visit.abroad == [] and visit.errors == []


def test_a_gateway_that_is_down_is_said(voila: Voila, visit: Visit, gateway):
    gateway.shutdown()
    gateway.server_close()
    assert visit.wait("part-gateway", "down")
    assert "no answer at" in visit.page.locator(".trouble").inner_text()


def test_a_lake_that_cannot_be_read_is_said_and_the_last_numbers_stay(voila: Voila, visit: Visit):
    log, shown = voila.home.lake / "events" / "_delta_log", visit.text("p50")
    aside = log.with_name("aside")
    log.rename(aside)
    log.mkdir()
    (log / "00000000000000000000.json").write_text("{damaged")
    visit.page.wait_for_function("document.body.innerText.includes('Could not be read')")
    assert visit.text("p50") == shown
    shutil.rmtree(log)
    aside.rename(log)
    visit.page.wait_for_function("!document.body.innerText.includes('Could not be read')")


@pytest.mark.long
def test_a_dashboard_that_dies_is_said_and_the_page_comes_back(voila: Voila, context):
    visit = Visit(context, pages.url(voila.home, voila.settings))
    visit.wait("p50", "ms")
    voila.stop()
    visit.page.wait_for_function("document.getElementById('rs-stale')?.innerText.includes('numbers below are old')")
    voila.start()
    visit.page.wait_for_function("!document.getElementById('rs-stale') && document.querySelector('[data-key=p50]')")


# What the platform has seen: 55 minutes of recommendations in waves, answers to some, one hostile title, refused records.


def event(name: str, at: int, **more) -> dict:
    return {EVENT_ID: name, USER_ID: "a" * 32, ITEM_ID: "item-0", TYPE: VIEW, TS: at, KNOWN_TS: at, **more}


def with_log(home: Home, use) -> None:
    log = SQLiteEventLog(home.eventlog)
    try: use(log)
    finally: log.close()


def move(home: Home) -> None:
    with_log(home, lambda log: Writer(log, Lake(home.lake)).step())


def fill(home: Home, *, now: int) -> None:
    lake, shown, events = Lake(home.lake), [], []
    titles = ["Walnut tray", EVIL, "Linen blanket", "Copper kettle", "Oak stool", "Glass vase", "Wool throw", "Steel lamp", "Stoneware mug", "Brass clock"]
    chance, at, n = random.Random(0), now - 55 * MINUTE, 0
    while at < now - 5_000:
        places = [min(int(chance.paretovariate(0.9)) + rank % 3, 49) for rank in range(10)]
        slots = [{ITEM_ID: f"item-{place}", SOURCE: "popular" if rank % 5 == 4 else "covisit", "rank": rank} for rank, place in enumerate(places)]
        shown.append({RECOMMENDATION_ID: f"r{n}", TS: at, TIER: chance.choices(("full", "without history", "popular"), (86, 10, 4))[0],
                      LATENCY_US: int(1000 * chance.lognormvariate(1.2, 0.4)), SLOTS: slots})
        for m, type in enumerate(chance.choices((VIEW, CART, PURCHASE), (85, 11, 4), k=chance.randrange(4))):
            answers = f"r{n}" if chance.random() < 0.1 else None
            events.append(event(f"e{n}.{m}", min(at + 1_500 * (m + 1), now - 1), type=type, recommendation_id=answers))
        at, n = at + int(chance.expovariate(1) * 3_000 / (1 + 0.6 * math.sin((now - at) / 400_000))), n + 1
    lake.append("items", pl.DataFrame([{ITEM_ID: f"item-{n}", TITLE: titles[n % 10] if n < 10 else f"Item {n}", TS: 1} for n in range(60)], schema=ITEMS))
    lake.append("impressions", pl.DataFrame(shown[:300], schema=IMPRESSIONS))
    refused = ["price must be a number from 0 to 1e+09"] * 3 + ["user_id must be text of 1 to 256 characters without control characters"]
    lake.append("quarantine", pl.DataFrame([{RULE: rule, RAW: b"", KNOWN_TS: now} for rule in refused], schema=QUARANTINE))
    about = {"model": "covisit", "created": now - 95 * MINUTE, "k": 10, "metrics": {"ndcg": {"mean": 0.1241, "low": 0.1183, "high": 0.1312}}}
    made = write(home.registry, {"weights": lambda p: p.write_bytes(b"0" * 1000)}, about=about)
    bundle.promote(home.registry, made.name, reason="the first", at=now - 94 * MINUTE)
    with_log(home, lambda log: (log.record(shown[300:]), log.append(events)))
    move(home)
