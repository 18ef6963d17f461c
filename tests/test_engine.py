"""What holds for every slate, whatever is asked; and the engine beside other threads."""
from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from gateway_process import bundle, champion
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.lake.eventlog import History, SQLiteEventLog
from recsys.models import covisit, popular, release
from recsys.models.bundle import promote
from recsys.prep.clean import interactions
from recsys.prep.vocab import Vocab
from recsys.schema import AVAILABLE_FROM, CATEGORY, EVENT_TYPES, IN_STOCK, ITEM_ID, PRICE
from recsys.serving import lists
from recsys.serving.arrange import How
from recsys.serving.catalogue import Catalogue, changed
from recsys.serving.content import Content
from recsys.serving.engine import RETRIEVAL, Engine
from recsys.serving.live import Live
from recsys.serving.policy import HIDE_SEEN, HIDES, codes
from recsys.serving.question import Memory
from recsys.serving.rules import Rule, Rules
from recsys.serving.wire import Filters, RecommendationRequest
from recsys.settings import Home
from recsys.synth import DAY, T0, shop

WORLD, NOW = shop(), T0 + 7 * DAY
FACTS = {row[ITEM_ID]: row for row in WORLD.items.to_dicts()}


def engine(items: pl.DataFrame = WORLD.items, hide_seen: str = "view") -> Engine:
    vocab, rows = Vocab.build(WORLD.items[ITEM_ID]), interactions(WORLD.events.lazy()).collect()
    models = tuple(m.fit(rows, asof=NOW, vocab=vocab) for m in (covisit, popular))
    rows = release.described(vocab, items)
    return Engine("b1", NOW, "v1", models, Catalogue.of(rows, vocab), How(hide_seen=hide_seen), content=Content.of(rows, models[-1].counts == 0))


def hidden(item_ids: list[str], types: list[str], *, hide_seen: str) -> set[str]:
    return {item for item, hide in zip(item_ids, HIDES[hide_seen][codes(types)], strict=True) if hide}


ENGINE = {word: engine(hide_seen=word) for word in HIDE_SEEN}
ids = st.sampled_from([*FACTS, "unknown", "чашка ☕", "'; DROP TABLE items; --"])
some = st.lists(ids, max_size=12)
bounds = st.one_of(st.none(), st.floats(0, 50))
filters = st.one_of(st.none(), st.builds(
    Filters, categories=st.one_of(st.none(), st.lists(st.sampled_from(["home", "home/tea", "home/te", "garden", "", "/"]), max_size=3)),
    price=st.one_of(st.none(), st.tuples(bounds, bounds)), in_stock=st.booleans(), items=st.one_of(st.none(), some)))
requests = st.builds(RecommendationRequest, user_id=st.sampled_from([None, "ann"]), items=some, k=st.integers(1, 300), exclude=some, filters=filters)


@st.composite
def histories(draw: st.DrawFn) -> History | None:
    rows = draw(st.lists(st.tuples(ids, st.sampled_from(EVENT_TYPES)), max_size=20))
    return draw(st.sampled_from([None, History(len(rows), [i for i, _ in rows], [t for _, t in rows], list(range(len(rows))))]))


def allowed(item: str, demands: Filters | None) -> bool:
    "What a filter means, said again in the plainest way."
    if demands is None: return True
    fact, (low, high) = FACTS[item], demands.price or (None, None)
    in_category = demands.categories is None or any(f"{fact[CATEGORY]}/".startswith(f"{c.rstrip('/')}/") for c in demands.categories)
    return ((not demands.in_stock or fact[IN_STOCK]) and (low is None or fact[PRICE] >= low) and (high is None or fact[PRICE] <= high)
            and in_category and (demands.items is None or item in demands.items))


@given(request=requests, history=histories(), hide_seen=st.sampled_from(HIDE_SEEN))
@settings(max_examples=400, deadline=None)
def test_what_holds_for_every_slate(request: RecommendationRequest, history: History | None, hide_seen: str):
    slate = ENGINE[hide_seen].recommend(request, history, now=NOW)
    shown = [s.item_id for s in slate.slots]
    seen = hidden(request.items, ["view"] * len(request.items), hide_seen=hide_seen) | (hidden(history.item_ids, history.types, hide_seen=hide_seen) if history else set())
    may = {i for i in FACTS if i not in seen and i not in request.exclude and allowed(i, request.filters)}
    assert set(shown) <= may and len(shown) == len(set(shown)) == min(request.k, len(may))  # nothing else, nothing twice, and no slot left empty
    assert all(s.propensity == 1.0 and s.reason and np.isfinite(s.score) and s.source in ("covisit", "new", "content", "popular") for s in slate.slots)
    assert all((s.reason == "popular now") == (s.source == "popular") for s in slate.slots)
    assert ENGINE[hide_seen].recommend(request, history, now=NOW) == slate
    assert (slate.tier == RETRIEVAL) == (history is not None or request.user_id is None) and slate.age_ms == 0  # `now` is when the bundle was fitted


def test_an_item_is_reachable_from_its_first_day():
    later = engine(WORLD.items.with_columns(pl.when(pl.col(ITEM_ID) == "rake").then(NOW).otherwise(pl.col(AVAILABLE_FROM)).alias(AVAILABLE_FROM)))
    shown = [{s.item_id for s in later.recommend(RecommendationRequest(k=99), None, now=at).slots} for at in (NOW - 1, NOW)]
    assert "rake" not in shown[0] and "rake" in shown[1] and len(shown[0]) == 8


def test_a_reason_names_the_item_that_was_bought():
    bought = History(3, ["mug", "pot", "pot"], ["view", "view", "purchase"], [1, 2, 3])
    slots = ENGINE["view"].recommend(RecommendationRequest(user_id="ann", k=3), bought, now=NOW).slots
    assert slots[0].reason == "because you bought Teapot" and slots[0].source == "covisit"


def test_the_champion_is_followed_and_a_rollback_is_a_swap(tmp_path: Path):
    home, live = Home.open(tmp_path), Live(Home.open(tmp_path))

    async def story() -> list[str]:
        following = asyncio.create_task(live.follow(every=0.02))
        served, made = [], [bundle(home, created=NOW + n) for n in range(2)]
        for new in (*made, made[0]):
            promote(home.registry, new, reason="test")
            began = time.monotonic()
            while (live.engine is None or live.engine.bundle != new) and time.monotonic() - began < 120: await asyncio.sleep(0.02)
            served.append(live.engine.bundle if live.engine else "")
        following.cancel()
        return served
    served = asyncio.run(story())
    assert served[0] == served[2] != served[1] and live.refused is None


def test_a_registry_that_is_not_there_is_no_error(tmp_path: Path):
    live = Live(Home(tmp_path / "nowhere"))
    assert not live.changed() and not live.refresh() and live.engine is None


@pytest.mark.parametrize("hide_seen", HIDE_SEEN)
def test_a_bundle_loads_with_the_policy_of_the_settings(tmp_path: Path, hide_seen: str):
    home = Home.open(tmp_path)
    loaded = Engine.load(home.registry / "bundles" / champion(home), how=How(hide_seen=hide_seen))
    assert loaded.how.hide_seen == hide_seen and loaded.asof == NOW and [m.name for m in loaded.models] == ["covisit", "popular"]


def test_an_item_that_few_met_is_still_new(tmp_path: Path):
    rows, vocab = interactions(WORLD.events.lazy()).collect(), Vocab.build(WORLD.items[ITEM_ID])
    floor = popular.fit(rows, asof=NOW, vocab=vocab)
    items = WORLD.items.with_columns(pl.when(pl.col(ITEM_ID) == "rake").then(NOW - 2 * DAY).otherwise(NOW - 90 * DAY).alias(AVAILABLE_FROM))
    about = {"created": NOW, "data": {"asof": NOW}, "metrics": {}, "settings": {}}
    loaded = Engine.load(release.write_bundle([floor], items, registry=tmp_path, about=about))
    rake, mug = vocab.encode(["rake", "mug"])
    assert floor.counts[[rake, mug]].all() and rake in loaded.content.new and mug not in loaded.content.new


@pytest.mark.parametrize("seed", range(4))
def test_who_is_remembered_gets_what_a_stranger_with_the_same_past_gets(tmp_path: Path, seed: int):
    rng, log, memory = random.Random(seed), SQLiteEventLog(tmp_path), Memory(5)
    worker = SimpleNamespace(memory=memory, log=log)
    plain = engine()
    now, serving, users, n, remembered = NOW, plain, [f"u{i}" for i in range(6)], 0, 0
    for _ in range(500):
        act = rng.random()
        if act < 0.25:
            n += 1
            log.append([{"event_id": f"e{n}", "user_id": rng.choice(users), "item_id": rng.choice([*FACTS, "late", "unknown"]), "type": rng.choice(EVENT_TYPES), "ts": now + n, "known_ts": now + n}])
        elif act < 0.30: log.pack(after=0, upto=log.last("events"), least=1)
        elif act < 0.33:
            catalogue = changed(serving.catalogue, [{ITEM_ID: rng.choice([*FACTS, "late"]), IN_STOCK: rng.random() < 0.5, AVAILABLE_FROM: now + rng.choice([0, 50])}])
            serving = replace(serving, catalogue=catalogue, content=plain.content.grown(catalogue))
        elif act < 0.36: serving = replace(serving, rules=Rules.of(rng.choice([(), (Rule(do="block", items=(rng.choice([*FACTS]),), until=datetime.fromtimestamp((now + 30) / 1000, UTC)),)])))
        elif act < 0.38: serving = replace(plain, bundle=f"b{n}")
        now += rng.randrange(20)
        user = rng.choice(users)
        request = RecommendationRequest(user_id=user, k=rng.choice([2, 5]), surface=rng.choice([None, "basket"]), filters=rng.choice([None, None, Filters(in_stock=True)]), items=rng.choice([[], [], [], ["mug"]]))
        known = lists._known(worker, serving, user)  # type: ignore[arg-type]
        assert known is not None
        before = known.found(request, serving.season(request.surface, now))
        slate = serving.answer(lists._asked(serving, request, known, now=now), known.user_seq, now=now)
        assert slate == serving.recommend(request, log.history(user), now=now)
        remembered += before is not None
        assert len(memory) <= 5
    assert remembered > 5
    log.close()
