"""A ranker from what was shown: the real retrain with impressions in the lake fits, judges and ships it, and the gateway answers in its order; and what it must not serve is refused once."""
from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest

from recsys.bench import loop
from recsys.bench.loop import Clock, Plan
from recsys.features.definitions import RANKER_V1, SERVICES
from recsys.lake.eventlog import EventLogError, Shown, SQLiteEventLog, open_log
from recsys.lake.tables import Lake
from recsys.models import bundle, release
from recsys.models.ranker import Ranker
from recsys.models.rankfit import examples
from recsys.ops import flows
from recsys.ops.writer import Writer
from recsys.serving.auth import Keys
from recsys.serving.engine import Engine
from recsys.serving.gateway import create_app
from recsys.settings import Home, Settings, load
from recsys.simulator import World
from recsys.synth import DAY, T0
from recsys.training.feedback import gather

PLAN = Plan(shoppers=260, items=150, before=14, days=2, explore=0.3)


def cheapest(world: World, shopper: int, slate: list[str], ts: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    "Shoppers who open what costs least, and so leave no doubt: which lists they get is drawn anew each time."
    return [(min(slate, key=lambda item: world.goods.price[world.item_index(item)]), "view")] if slate else []


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Home:
    "Two days of lists in the lake, as the gateway and the writer put them there, and a retrain by its notebooks."
    folder = tmp_path_factory.mktemp("loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "respond", cheapest)
        loop.run("full", 0, PLAN, folder)
    home = Home.open(folder / "full-0")
    shutil.rmtree(home.registry)  # the watch has champions of its own; the shop of this test has none yet
    (home.path / "settings.ini").write_text("[features]\nservice = ranker_v1\n[policy]\nexplore = 0.3\n[ranker]\nleast = 20\ntolerance = 0.5\n")
    return home


def answers(home: Home, settings: Settings, users: list[str], *, later: int = 0, batch: bool = False) -> list[dict[str, Any]]:
    "What the gateway says to some shoppers, one a second or all at once, a day after the watch and some ms."
    clock = Clock(World(PLAN.size(0), start_ms=T0).start_ms + (PLAN.before + PLAN.days) * DAY + later)
    keys = Keys(home.keys)
    key = keys.create(["recs:read"], name="test")
    keys.close()
    app = create_app(home, settings, clock=clock)

    async def ask() -> list[dict[str, Any]]:
        async with app.life.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://shop", headers={"Authorization": f"Bearer {key}"}) as client:
            found, requests = [], [{"user_id": user, "k": 5, "filters": {"in_stock": True}} for user in users]
            if batch: return (await client.post("/v1/recommendations/batch", json={"requests": requests})).json()["answers"]
            for request in requests:
                clock.now += 1000
                found.append((await client.post("/v1/recommendations", json=request)).json())
            return found
    return asyncio.run(ask())


def test_a_retrain_ships_a_ranker_and_the_gateway_serves_in_its_order(shop: Home, capsys: pytest.CaptureFixture):
    settings = load({}, home=shop.path)
    done = flows.run("retrain", {}, home=shop, settings=settings, runs=shop.path / "runs")
    said = json.loads((Path(done.folder) / "05_publish.json").read_text())
    ranking = said["ranking"]
    assert said["promoted"] and ranking["promote"], ranking["why"]
    assert ranking["feedback"]["with features"] == ranking["feedback"]["slots"] > 0 and ranking["gain"]["low"] <= ranking["gain"]["mean"] <= ranking["gain"]["high"] and ranking["curve"]
    champion = bundle.champion(shop.registry)
    assert bundle.manifest(champion).about["ranker"] and release.load(champion).ranker is not None
    found = answers(shop, settings, ["shopper-00001", "shopper-00002", "nobody-yet"])
    assert [a["tier"] for a in found] == ["full"] * 3 and all(len(a["items"]) == 5 for a in found)  # a shopper that nobody has met yet is ranked, too

    capsys.readouterr()
    other = replace(settings, features=replace(settings.features, service="retrieval_v1"))
    found = answers(shop, other, ["shopper-00001", "shopper-00002"])
    log = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    refused = [line for line in log if line["event"] == "ranker refused"]
    assert [a["tier"] for a in found] == ["without ranker"] * 2
    assert len(refused) <= 1 and not [line for line in log if line["event"] == "ranker failed"]  # said once, and not at every answer


@pytest.mark.parametrize("batch", [False, True])
def test_what_a_ranker_was_told_is_what_it_learns_from(shop: Home, monkeypatch: pytest.MonkeyPatch, batch: bool):
    champion = bundle.champion(shop.registry)
    if not bundle.manifest(champion).about["ranker"]: pytest.skip("the test before ships it")
    settings, told, inputs = load({}, home=shop.path), list[tuple[list[int], np.ndarray]](), Ranker.inputs

    def listening(self: Ranker, query: Any, candidates: Any, rows: Any) -> np.ndarray:
        told.append((candidates.items.tolist(), made := inputs(self, query, candidates, rows)))
        return made
    monkeypatch.setattr(Ranker, "inputs", listening)
    new = f"nobody-{batch}"
    asked = ["shopper-00001", "shopper-00002", "shopper-00001", new, "shopper-00001", new]  # each list is shown before the next one; not so in a batch, where all are made and then go
    found = answers(shop, settings, asked, later=DAY // 2 + batch * DAY // 8, batch=batch)
    told = told[-len(found):]  # a bundle is tried with a question when it is loaded
    log = open_log(shop, settings)
    clock = Clock(World(PLAN.size(0), start_ms=T0).start_ms + (PLAN.before + PLAN.days + 1) * DAY)
    writer, lake = Writer(log, Lake(shop.lake), clock=clock), Lake(shop.lake)
    while writer.step().impressions: pass
    log.close()
    feedback, release_ = gather(lake.scan("impressions"), lake.scan("events"), asof=clock.now), release.load(champion)
    some = examples(feedback, release_.ranker.facts, release_.vocab, release_.ranker.scales)
    learned, ids = release_.ranker.scales.scaled(some.raw), feedback.slots["recommendation_id"].to_list()
    seen = list[bool]()
    for answer, (items, rows) in zip(found, told, strict=True):
        at = [n for n, id in enumerate(ids) if id == answer["recommendation_id"]]
        assert len(at) == len(answer["items"]) == 5
        for n in at:
            served = rows[items.index(int(some.items[n]))]
            np.testing.assert_allclose(served, learned[n], rtol=0, atol=1e-5, err_msg=answer["recommendation_id"])
            seen.append(bool(some.raw[n][release_.ranker.scales.names.index("shown")] > 0))
    assert any(seen) and not all(seen)
    kept = {id: json.loads(text)["shown"] for id, text in lake.scan("impressions").select("recommendation_id", "features").collect().iter_rows() if id in {a["recommendation_id"] for a in found}}
    assert kept[found[3]["recommendation_id"]][0] == 0 and kept[found[5]["recommendation_id"]][0] == (not batch)


def test_likeness_is_on_record_of_what_a_ranker_put_in_order(shop: Home):
    lake = Lake(shop.lake)
    slots = gather(lake.scan("impressions"), lake.scan("events"), asof=10**15).slots
    watched = slots.filter(pl.col("bundle").is_in(slots.filter(pl.col("alike").is_not_null())["bundle"].unique().implode()))
    assert len(watched) and watched["alike"].is_not_null().mean() > 0.5  # a newcomer, and an item of which the network knows nothing, have none
    assert watched["alike"].abs().max() < 2.5 and watched["alike"].n_unique() > 100


def test_a_log_that_forgets_what_was_shown_costs_a_rung_and_no_answer(shop: Home, monkeypatch: pytest.MonkeyPatch):
    if not bundle.manifest(bundle.champion(shop.registry)).about["ranker"]: pytest.skip("the test before ships it")
    log = open_log(shop)
    last = log.last("impressions")

    def broken(self: SQLiteEventLog, user_id: str, *, now: int) -> list[Shown]: raise EventLogError("the disk is gone")
    with monkeypatch.context() as patch:
        patch.setattr(SQLiteEventLog, "shown", broken)
        found = answers(shop, load({}, home=shop.path), ["shopper-00001"] * 2, later=DAY // 4)
    assert [a["tier"] for a in found] == ["without features"] * 2 and all(len(a["items"]) == 5 for a in found)
    assert [json.loads(row["features"])["shown"] for _, row in log.read("impressions", after=last, limit=9)] == [[0, 0]] * 2  # and learned from as it was made
    log.close()


def test_a_ranker_of_other_features_is_refused_when_it_is_loaded(shop: Home):
    champion = bundle.champion(shop.registry)
    if not bundle.manifest(champion).about["ranker"]: pytest.skip("the test before ships it")
    served, other = Engine.load(champion, service=RANKER_V1), Engine.load(champion, service=SERVICES["retrieval_v1"])
    assert served.ranker is not None and served.best == "full"
    assert other.ranker is None and other.best == "without ranker" and "set [features] service = ranker_v1, or retrain" in str(other.without)


def test_an_empty_impression_and_a_shop_without_any(shop: Home):
    lake = Lake(shop.lake)
    some = lake.scan("impressions")
    empty = some.with_columns(pl.col("slots").list.head(0))
    assert len(gather(empty, lake.scan("events"), asof=10**15)) == 0 == len(gather(some.filter(pl.lit(False)), lake.scan("events"), asof=10**15))
    both = gather(pl.concat([some, empty.with_columns(pl.col("recommendation_id") + "-e")]), lake.scan("events"), asof=10**15)
    assert len(both) == len(gather(some, lake.scan("events"), asof=10**15)) > 0 and np.isfinite(both.slots["place"].to_numpy()).all()
