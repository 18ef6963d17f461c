"""The simulated shop at sizes, seeds and times that its lessons do not show, and that there is something to learn in it."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys import truth
from recsys.models import covisit, popular
from recsys.prep.clean import interactions
from recsys.prep.sequences import from_frame
from recsys.prep.vocab import Vocab
from recsys.schema import (
    AVAILABLE_FROM,
    CART,
    EVENT_ID,
    EVENT_RULES,
    EVENTS,
    IN_STOCK,
    ITEM_ID,
    ITEM_RULES,
    ITEMS,
    PURCHASE,
    REMOVE,
    SESSION_ID,
    TS,
    TYPE,
    VIEW,
    broken_index,
)
from recsys.simulator import Size, World, browse, choose, hours, respond, slate_weights, weekday
from recsys.synth import DAY, HOUR, T0
from recsys.truth import chance

ROOT = Path(__file__).parents[1]


def log_of(world: World) -> pl.DataFrame: return pl.concat(list(world.events()))


@pytest.mark.parametrize("size", [Size(1, 40, 1), Size(3, 41, 2, seed=9), Size(200, 2500, 3), Size(900, 130, 12, seed=2**31)], ids=str)
@pytest.mark.parametrize("start", [T0, T0 + 17 * HOUR + 123])
def test_a_log_of_any_size_and_start_keeps_the_rules(size: Size, start: int):
    world = World(size, start_ms=start)
    frames = list(world.events())
    log = pl.concat(frames)
    assert len(frames) == size.days and log.schema == pl.Schema(EVENTS) and world.items.schema == pl.Schema(ITEMS)
    assert log[TS].is_sorted() and log[EVENT_ID].n_unique() == log.height
    assert all(((f[TS] - start) // DAY == d).all() for d, f in enumerate(frames))
    assert log.select(broken_index(EVENT_RULES, now=world.end_ms)).to_series().null_count() == log.height
    assert world.items.select(broken_index(ITEM_RULES, now=world.end_ms)).to_series().null_count() == size.items
    assert (log.join(world.items, on=ITEM_ID).select((pl.col(TS) >= pl.col(AVAILABLE_FROM)).all()).item())


def test_what_is_sold_out_is_not_looked_at():
    world = World(Size(400, 200, 20))
    looked = log_of(world).filter(pl.col(TYPE) == VIEW).with_columns(day=(pl.col(TS) - world.start_ms) // DAY, row=pl.col(ITEM_ID).str.slice(5).cast(pl.Int64))
    late = 0
    for (day,), frame in looked.group_by("day"): late += (~world.in_stock(world.start_ms + day * DAY)[frame["row"].to_numpy()]).sum()
    assert late < 0.02 * looked.height  # sessions that run past midnight


def test_sales_follow_carts_and_carts_follow_views():
    log = log_of(World(Size(800, 200, 10)))
    one = log.filter(pl.col(SESSION_ID).is_not_null()).group_by(SESSION_ID, ITEM_ID).agg(
        *[pl.col(TS).filter(pl.col(TYPE) == t).min().alias(t) for t in (VIEW, CART, REMOVE, PURCHASE)])
    whole = one.filter(pl.col(CART).is_not_null())
    assert whole.height > 200 and (whole[VIEW] < whole[CART]).all()
    for then in (REMOVE, PURCHASE): assert one.filter(pl.col(then).is_not_null()).select((pl.col(CART) < pl.col(then)).fill_null(False).all()).item()
    assert one.filter(pl.col(REMOVE).is_not_null() & pl.col(PURCHASE).is_not_null()).is_empty()


def test_hours_and_weekdays_are_those_of_the_calendar_whatever_the_start():
    assert weekday(T0) == 3  # 2026-01-01 was a Thursday
    for start in (T0, T0 + 13 * HOUR):
        log = log_of(World(Size(1500, 60, 7), start_ms=start)).filter(pl.col(TYPE) == VIEW)
        by_hour = np.bincount(log.select(pl.col(TS) % DAY // HOUR).to_series(), minlength=24) / log.height
        assert by_hour[19:22].sum() > 0.15 and by_hour[2:5].sum() < 0.03
    assert all(abs(hours(d).sum() - 1) < 1e-12 for d in range(7))


DIGEST = """
import hashlib, sys
from recsys.simulator import Size, World
whole, world = hashlib.sha256(), World(Size(300, 300, 4, seed=int(sys.argv[1])), start_ms=1_700_000_000_000)
for frame in [world.items, world.stock_changes, *world.events()]: whole.update(frame.write_csv().encode())
print(whole.hexdigest())
"""


def test_the_same_bytes_in_another_process_with_another_number_of_threads():
    runs = [subprocess.run([sys.executable, "-c", DIGEST, seed], env=os.environ | {"OMP_NUM_THREADS": n, "POLARS_MAX_THREADS": n, "PYTHONHASHSEED": n},
                           capture_output=True, text=True, check=True).stdout for seed, n in (("0", "1"), ("0", "2"), ("1", "1"))]
    assert runs[0] == runs[1] != runs[2]


def test_a_day_does_not_depend_on_how_the_days_are_read_and_worlds_do_not_share_ids():
    size = Size(100, 80, 5)
    first = next(iter(World(size).events()))
    assert first.equals(log_of(World(size))[: first.height])
    elsewhere = [World(size, start_ms=T0 + 1), World(Size(100, 80, 6)), World(Size(100, 80, 5, seed=1))]
    seen = set(log_of(World(size))[EVENT_ID])
    assert all(seen.isdisjoint(log_of(w)[EVENT_ID]) for w in elsewhere)


def test_a_preference_is_the_same_in_any_company_and_lives_on_after_the_history():
    world = World(Size(50, 100, 5))
    for ts in (T0 - 40 * DAY, T0, world.end_ms - 1, world.end_ms + 400 * DAY):
        whole = world.preference(np.arange(50), ts)
        assert whole.dtype == np.float32 and whole.shape == (50, 100) and np.isfinite(whole).all()
        assert np.allclose(world.preference([31], ts)[0], whole[31], atol=1e-4)
    assert len(world.session_starts(world.end_ms + 400 * DAY, 7, np.random.default_rng(0))) == 7
    assert not np.allclose(world.preference([0], T0), world.preference([0], T0 + 3 * truth.NEED_DAYS * DAY))


def test_the_history_is_made_by_the_preference_that_is_told():
    world, day = World(Size(40, 150, 9)), 6
    shopper = np.arange(40)
    row, item, utility = browse(world, day, shopper, np.random.default_rng(0))
    assert np.allclose(utility, world.preference(shopper, world.start_ms + day * DAY)[row, item], atol=1e-4)


def test_answers_follow_the_chances_of_the_slate():
    utility, sale, rng = np.array([6.0, 5.0, 7.0, 9.0], np.float32), np.array([True, True, True, False]), np.random.default_rng(0)
    weights = slate_weights(utility, sale)
    answers = [respond(utility, sale, rng) for _ in range(6000)]
    first = np.bincount([a[0][0] if a and a[0][1] == VIEW else 4 for a in answers], minlength=5) / len(answers)
    assert np.allclose(first, weights / weights.sum(), atol=0.02) and first[3] == 0
    front, back = (slate_weights(np.full(10, 6.0, np.float32), np.ones(10, bool))[at] for at in (0, 9))
    assert front / back == pytest.approx(10**0.5)
    assert respond(np.zeros(0, np.float32), np.zeros(0, bool), rng) == []


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 2**32))
def test_only_what_has_weight_is_chosen(width: int, height: int, seed: int):
    rng = np.random.default_rng(seed)
    weights = rng.random((height, width)) * (rng.random((height, width)) < 0.3)
    weights[np.arange(height), rng.integers(width, size=height)] = 1e-6
    rows = rng.integers(height, size=500)
    assert (weights[rows, choose(weights.astype(np.float32), rows, rng)] > 0).all()


def test_chance_is_uniform_and_takes_every_key_into_account():
    drawn = chance(0, 3, np.arange(100_000), 7)
    assert 0 <= drawn.min() and drawn.max() < 1 and np.abs(np.histogram(drawn, 20)[0] / 5000 - 1).max() < 0.08
    assert len({float(chance(s, a, b)[0]) for s in (0, 1) for a in (0, 1, -1) for b in (0, 1, 2)}) == 18
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02


def test_stock_changes_lead_to_the_state_at_the_end():
    world = World(Size(5, 300, 25, seed=3))
    changes = world.stock_changes
    assert changes.schema == pl.Schema(ITEMS) and changes[TS].is_between(world.start_ms, world.end_ms, closed="left").all()
    last = pl.concat([world.items, changes]).sort(TS, maintain_order=True).unique(ITEM_ID, keep="last").sort(ITEM_ID)
    launched = (last[AVAILABLE_FROM] < world.end_ms).to_numpy()
    assert (last[IN_STOCK].to_numpy() == world.in_stock(world.end_ms - 1))[launched].all()
    flips = pl.concat([world.items, changes]).select((pl.col(IN_STOCK) != pl.col(IN_STOCK).shift().over(ITEM_ID)).fill_null(True))
    assert flips.to_series().all()


@pytest.mark.parametrize(("wrong", "says"), [({"shoppers": 0}, "shoppers = 0"), ({"items": 39}, "items = 39.*at least 40"), ({"seed": -1}, "seed = -1")])
def test_an_impossible_size_is_refused_by_name(wrong: dict, says: str):
    with pytest.raises(ValueError, match=says): Size(**wrong)


def test_taste_and_company_beat_popularity_and_leave_room():
    "Of the clicks that are achievable by who knows the truth: popular items reach much less than covisitation, which is far from all."
    world = World(Size(shoppers=1500, items=600, days=40))
    rows = interactions(log_of(world).lazy()).collect()
    vocab, now = Vocab(world.items[ITEM_ID]), world.end_ms
    users, queries = from_frame(rows.lazy(), vocab)
    who = users.str.slice(8).cast(pl.Int64).to_numpy()
    rng = np.random.default_rng(0)
    truth_best = np.argsort(-np.where(world.in_stock(now), world.preference(who, now), -np.inf), axis=1)[:, :10]
    slates = {"best": truth_best, "random": rng.integers(world.size.items, size=truth_best.shape)}
    for name, kind in (("popular", popular), ("covisit", covisit)):
        model = kind.fit(rows, asof=now, seed=0, vocab=vocab)
        slates[name] = model.recommend(queries, k=10).items - 1
    reached = {name: world.click_chance(who, slate.astype(np.int64), now).mean() for name, slate in slates.items()}
    share = {name: r / reached["best"] for name, r in reached.items()}
    assert share["random"] < 0.4 < share["popular"] < share["covisit"] - 0.08 < 0.85, share


def test_the_truth_stays_with_the_simulator():
    for path in (ROOT / "recsys").rglob("*.py"):
        if path.name in ("simulator.py", "truth.py"): continue
        assert not re.search(r"^\s*(from|import) .*\btruth\b", path.read_text(), re.M), path


TIMED = """
import os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from recsys.simulator import Size, World
started = time.process_time()
made = sum(frame.height for frame in World(Size(shoppers=int(sys.argv[1]))).events())
print(made, time.process_time() - started)
"""


def on_one_core(shoppers: int) -> tuple[int, float]:
    "Events of a world, and the seconds of one core that they take."
    env = os.environ | {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    made, seconds = subprocess.run([sys.executable, "-c", TIMED, str(shoppers)], env=env, capture_output=True, text=True, check=True).stdout.split()
    return int(made), float(seconds)


def test_the_default_shop_has_some_400_thousand_events_in_a_few_seconds():
    made, seconds = on_one_core(Size().shoppers)
    assert 350_000 < made < 450_000 and seconds < 8, (made, seconds)


@pytest.mark.long
def test_a_million_events_take_less_than_20_seconds_of_one_core():
    made, seconds = on_one_core(13_000)
    assert made > 1_000_000 and seconds < 20, (made, seconds)
