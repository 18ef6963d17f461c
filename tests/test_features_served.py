"""The ring of features: what shoppers do is in the lake with its place, the gateway writes down what it served, a retrain proves it, and a fault stops it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from recsys.features import parity
from recsys.features.store import REGISTRY, open_store
from recsys.features.updater import Updater
from recsys.lake.eventlog import SQLiteEventLog
from recsys.lake.tables import Lake
from recsys.models import covisit, popular, recipes, release
from recsys.models.bundle import promote
from recsys.ops import flows
from recsys.ops.receipts import receipt, told
from recsys.ops.writer import Writer
from recsys.prep.clean import interactions
from recsys.prep.vocab import Vocab
from recsys.schema import EVENTS, IMPRESSIONS
from recsys.serving.auth import Keys
from recsys.serving.gateway import create_app
from recsys.settings import Home, Settings, load
from recsys.synth import DAY, MINUTE, shop

START = time.time_ns() // 1_000_000 // MINUTE * MINUTE - 12 * DAY  # a shop of the last days: the features step packs as of now
DONE = START + 10 * DAY


def moved(events: pl.DataFrame) -> pl.DataFrame:
    shift = START - events["ts"].min() // DAY * DAY
    return events.with_columns(pl.col("ts") + shift, pl.col("known_ts") + shift)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    "A shop with a history and a champion."
    made, world = Home.open(tmp_path_factory.mktemp("home")), shop()
    items = world.items.with_columns(pl.lit(START).alias("ts"), pl.lit(START).alias("available_from"))
    events = moved(world.events)
    Lake(made.lake).append("events", events.select(list(EVENTS)))
    Lake(made.lake).append("items", items)
    vocab, rows = Vocab.build(items["item_id"]), interactions(events.lazy()).collect()
    models = [m.fit(rows, asof=DONE, vocab=vocab) for m in (covisit, popular)]
    recipe = recipes.candidates("covisit", times=True)[0]
    about: dict[str, Any] = {"created": DONE, "data": {"asof": DONE}, "metrics": {}, "settings": {}, "model": recipe.model, "recipe": recipe.plain}
    promote(made.registry, release.write_bundle(models, items, registry=made.registry, about=about).name, reason="test")
    return made


@pytest.fixture(scope="module")
def settings(home: Home) -> Settings:
    return load(home=home.path)


@pytest.fixture(scope="module")
def key(home: Home) -> str:
    keys = Keys(home.keys)
    try:
        return keys.create(["events:write", "recs:read"], name="test")
    finally:
        keys.close()


def ask(home: Home, settings: Settings, key: str, *requests: tuple[str, Any], until: Callable[[dict[str, Any]], bool] | None = None) -> list[httpx.Response]:
    "A worker in this process; requests one after the other, once what is on record of a visitor's answers is as wanted."

    async def visit() -> list[httpx.Response]:
        app = create_app(home, settings)
        async with app.life.lifespan_context(app):
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://shop", headers={"Authorization": f"Bearer {key}"}) as client:
                end = time.monotonic() + 120
                while until and not until(shown(home, await client.post("/v1/recommendations", json={"user_id": "probe", "k": 1}))):
                    assert time.monotonic() < end, "the features did not come"
                    await asyncio.sleep(0.2)
                return [await client.post(path, json=body) for path, body in requests]

    with ThreadPoolExecutor() as pool:
        return pool.submit(asyncio.run, visit()).result()


def click(n: int, item: str = "mug") -> tuple[str, Any]:
    return "/v1/events", {"events": [{"event_id": f"live-{n}", "user_id": "ann", "item_id": item, "type": "view"}]}


WISH = ("/v1/recommendations", {"user_id": "ann", "k": 3})


def bring(home: Home, settings: Settings) -> None:
    "The writer's work: log to lake, lake to online rows."
    log, lake = SQLiteEventLog(home.eventlog), Lake(home.lake)
    try:
        Writer(log, lake).step()
        Updater.open(home, settings, lake).step()
    finally:
        log.close()


def shown(home: Home, answer: httpx.Response) -> dict[str, Any]:
    log = SQLiteEventLog(home.eventlog)
    try:
        found = log.impression(answer.json()["recommendation_id"])
    finally:
        log.close()
    assert found is not None
    return {**found, "features": json.loads(found["features"])}


def logged_again(home: Home, spoil: Callable[[dict[str, Any]], None]) -> int:
    "Copies of the impressions in the lake, spoilt where they have a shopper's row; how many have."
    lake, spoilt = Lake(home.lake), 0
    rows = lake.scan("impressions").collect().to_dicts()
    for n, row in enumerate(rows):
        kept = json.loads(row["features"])
        if kept.get("user"):
            spoil(kept)
            spoilt += 1
        row.update(recommendation_id=f"spoilt-{n}", features=json.dumps(kept))
    lake.append("impressions", pl.DataFrame(rows, schema=IMPRESSIONS))
    return spoilt


def test_a_home_without_features_serves_as_before(home: Home, settings: Settings, key: str):
    (answer,) = ask(home, settings, key, WISH)
    assert answer.json()["tier"] == "retrieval" and shown(home, answer)["features"] == {"request": {"k": 3}}
    assert not (home.features / REGISTRY).exists()


def test_the_ring(home: Home, settings: Settings, key: str):
    ask(home, settings, key, click(1), click(2, "pot"))
    bring(home, settings)
    done = flows.run("features", {}, home=home, settings=settings, runs=home.path / "runs")
    step = json.loads((Path(done.folder) / "01_features.json").read_text())
    assert step["online"] == "up to date" and step["mismatches"] == 0 and step["tables"]["user_windows"] > 0

    answers = ask(home, settings, key, WISH, click(3), WISH, until=lambda seen: bool(seen["features"].get("user") and seen["features"].get("items")))
    first, last = shown(home, answers[0]), shown(home, answers[2])
    assert answers[0].json()["tier"] == "retrieval" and first["features"]["service"] == "retrieval_v1"
    assert first["features"]["user"]["user_events_1h"] == 2 and first["features"]["user"]["user_seq"] == 2
    assert last["features"]["user"]["user_seq"] == 2 and last["user_seq"] == 3  # the row follows in a second, the history at once
    assert set(first["features"]["items"]) == {s["item_id"] for s in first["slots"]} and first["items_version"] == step["items_versions"]["retrieval_v1"]

    bring(home, settings)
    found = parity.check(Lake(home.lake))
    assert found.ok and found.compared >= 2 * (8 + 3 * 8) and found.late == 0, found.examples
    text = told(receipt(answers[0].json()["recommendation_id"], home=home))
    assert "user_events_1h 2" in text and first["items_version"] in text


def test_a_store_that_broke_is_a_rung_of_the_ladder(home: Home, settings: Settings, key: str, monkeypatch: pytest.MonkeyPatch):
    open_store(home, settings)
    kept = (home.features / REGISTRY).read_bytes()
    (home.features / REGISTRY).write_bytes(b"this is no registry")
    try:
        (answer,) = ask(home, settings, key, WISH, until=lambda seen: seen["tier"] == "without features")
    finally:
        (home.features / REGISTRY).write_bytes(kept)
    assert answer.status_code == 200 and answer.json()["tier"] == "without features" and answer.json()["items"]
    found = shown(home, answer)
    assert found["features"]["user"] is None and found["features"]["items"]


def test_a_difference_stops_the_release(home: Home, settings: Settings):
    "A retrain on a home where a served value was altered: the step counts it, the gate refuses, and shoppers keep their model."
    wrong = logged_again(home, lambda kept: kept["user"].update(user_events_30d=kept["user"]["user_events_30d"] + 1))
    before = (home.registry / "champion.json").read_text()
    done = flows.run("retrain", {}, home=home, settings=settings, runs=home.path / "runs")
    counted, published = (json.loads((Path(done.folder) / name).read_text()) for name in ("02_features.json", "05_publish.json"))
    assert counted["mismatches"] == wrong == counted["parity"]["features"]["user_events_30d"]["mismatches"] > 1
    assert not published["promoted"] and f"user_events_30d ({wrong} of" in published["reasons"][0]
    assert (home.registry / "champion.json").read_text() == before
