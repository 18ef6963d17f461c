"""The ranker of baskets on a made shop in which the right answer is known: what is due this week is bought, and nothing reads past the moment of a basket."""
from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from recsys.bench import basket_ranker as ranker
from recsys.bench.basket_lists import GOODS, NAMES, Log, feedback, listed
from recsys.bench.baskets import invoices
from recsys.bench.harness import BenchError
from recsys.cli.bench import bench_app
from recsys.prep.vocab import Vocab
from recsys.schema import ITEM_ID, TS, USER_ID
from recsys.training.splits import cases, time_split

BEGIN, DAY = datetime(2011, 1, 3, 9), 86_400_000


def shop(folder: Path, *, customers: int = 40, days: int = 150) -> Path:
    "A file as Online Retail is: everybody comes each week, takes tea every time, coffee every second time, and two things of no rule."
    rng, rows = np.random.default_rng(0), []
    for customer in range(customers):
        for visit, day in enumerate(range(customer % 7, days, 7)):
            when = BEGIN + timedelta(days=day, minutes=int(customer))
            taken = [f"TEA {customer % 6}", *([f"COFFEE {customer % 9}"] if visit % 2 == customer % 2 else []), *(f"THING {n}" for n in rng.choice(40, 2, replace=False))]
            rows += [{"Description": name, "Quantity": int(rng.integers(1, 5)), "InvoiceDate": when, "UnitPrice": 1.0 + len(name) % 5, "CustomerID": 10_000.0 + customer} for name in taken]
    rows += [{"Description": "TEA 0", "Quantity": -1, "InvoiceDate": BEGIN, "UnitPrice": 1.0, "CustomerID": 10_000.0}, {"Description": None, "Quantity": 1, "InvoiceDate": BEGIN, "UnitPrice": 0.0, "CustomerID": None}]
    (folder / "online-retail").mkdir(parents=True)
    pl.DataFrame(rows).with_columns(pl.col("InvoiceDate").cast(pl.Datetime("ns"))).write_parquet(folder / "online-retail" / "online_retail.parquet")
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame: return invoices(shop(tmp_path_factory.mktemp("retail")))


def window(rows: pl.DataFrame, days: tuple[int, int]) -> tuple[int, int]:
    first = int(rows[TS].min())  # type: ignore[arg-type]
    return first + days[0] * DAY, first + days[1] * DAY


def test_the_baskets_are_those_of_the_other_benchmark(rows: pl.DataFrame) -> None:
    split = time_split(rows, holdout=0.1)
    log = Log.of(rows)
    lists = listed(log, rows, split.window("test"), weights=(2.0, 0.25), depth=20)
    asked = cases(rows, split, "test", lists.vocab, target="basket", history=10_000)
    ours = {(lists.log.users[int(lists.log.starts[b])], tuple(sorted(t.tolist()))) for b, t in zip(lists.baskets, lists.targets, strict=True)}
    assert ours == {(u, tuple(sorted(t.tolist()))) for u, t in zip(asked.users, asked.targets, strict=True)} and len(lists.baskets) == len(asked)


def test_nothing_reads_past_the_moment_of_a_basket(rows: pl.DataFrame) -> None:
    span = window(rows, (100, 115))
    whole = listed(Log.of(rows), rows, span, weights=(2.0, 0.25), depth=20)
    q = len(whole.baskets) // 2
    now, user = int(whole.now[q]), whole.log.users[int(whole.log.starts[whole.baskets[q]])]
    known = rows.filter((pl.col(TS) < now) | ((pl.col(TS) == now) & (pl.col(USER_ID) == user)))  # what is bought later, and by others at the same moment, is gone
    past = listed(Log.of(known), known, span, weights=(2.0, 0.25), depth=20)
    at = np.flatnonzero((past.now == now) & np.array([past.log.users[int(past.log.starts[b])] == user for b in past.baskets]))[0]
    assert past.vocab == whole.vocab and np.array_equal(past.items[at], whole.items[q])
    assert np.array_equal(past.values[at], whole.values[q], equal_nan=True) and np.array_equal(past.frozen[at], whole.frozen[q], equal_nan=True)
    changed = rows.with_columns(pl.when(pl.col(TS) >= now).then(pl.lit("TEA 1")).otherwise(pl.col(ITEM_ID)).alias(ITEM_ID))
    other = listed(Log.of(changed), changed, span, weights=(2.0, 0.25), depth=20)
    assert np.array_equal(other.values[q], whole.values[q], equal_nan=True)


def test_frozen_lists_know_no_count_of_their_own_window(rows: pl.DataFrame) -> None:
    lists = listed(Log.of(rows), rows, window(rows, (100, 115)), weights=(2.0, 0.25), depth=20)
    month = NAMES.index(GOODS[0])
    late = len(lists.baskets) - 1
    tea = int(lists.vocab.encode(["TEA 1"])[0])
    sold = {q: lists.frozen[q][lists.items[q] == tea, month] for q in (0, late)}
    assert len({float(v[0]) for v in sold.values() if len(v)}) == 1 and not np.array_equal(lists.frozen[late], lists.values[late], equal_nan=True)


def test_a_ranker_learns_what_is_due(rows: pl.DataFrame) -> None:
    log = Log.of(rows)
    early, late = (listed(log, rows, window(rows, days), weights=(2.0, 0.25), depth=20) for days in ((60, 100), (120, 150)))
    found = ranker.learned([early], late, seed=0, decay=0.1)
    chance = ranker.bought_chance(found, late)
    coffee = np.array([name is not None and name.startswith("COFFEE") for name in [None, *late.vocab.ids]])[late.items] & (late.values[:, :, 0] > 1)
    due = coffee & late.bought
    assert due.any() and chance[due].mean() > chance[coffee & ~late.bought].mean() + 0.2  # everybody has bought it often; only every second week it is due
    same = ranker.bought_chance(ranker.learned([early], late, seed=0, decay=0.1), late)
    assert np.array_equal(same, chance)


def test_money_of_a_basket(rows: pl.DataFrame) -> None:
    lists = listed(Log.of(rows), rows, window(rows, (120, 150)), weights=(2.0, 0.25), depth=20)
    q = 3
    first, last = lists.targets.offsets[q:q + 2]
    bought = rows.filter((pl.col(USER_ID) == lists.log.users[int(lists.log.starts[lists.baskets[q]])]) & (pl.col(TS) == int(lists.now[q])))
    assert lists.value[first:last].sum() == pytest.approx((bought["price"] * bought["quantity"]).sum())
    alone = np.zeros((len(lists.baskets), 10), np.int32)
    alone[q, 0] = lists.targets[q][0]
    said = ranker.worth(lists, alone)
    assert said["recall@10"][q] == 1 / (last - first) and said["revenue@10"][q] == pytest.approx(lists.value[first] / lists.value[first:last].sum())
    free = replace(lists, value=np.zeros_like(lists.value))
    assert np.isnan(ranker.worth(free, alone)["revenue@10"]).all()


def test_an_empty_window_and_a_short_log_say_so(rows: pl.DataFrame, tmp_path: Path) -> None:
    log = Log.of(rows)
    with pytest.raises(ValueError, match="nobody bought anything"): listed(log, rows, window(rows, (400, 410)), weights=(1.0, 1.0))
    split = time_split(rows, holdout=0.3)
    with pytest.raises(ValueError, match="too short to learn from"): ranker.spans(split, "validation", 5, since=int(log.ts.min()))
    with pytest.raises(BenchError, match="RECSYS_DATA"): ranker.compare(tmp_path)


def test_a_basket_of_an_unknown_customer_with_an_unknown_item(rows: pl.DataFrame) -> None:
    span = window(rows, (140, 160))
    stranger = rows.tail(1).with_columns(pl.lit("stranger").alias(USER_ID), pl.lit("NEVER SEEN").alias(ITEM_ID), pl.lit(span[1] - 1).alias(TS))
    more = pl.concat([rows, stranger])
    lists = listed(Log.of(more), more, span, weights=(2.0, 0.25), depth=20)
    assert lists.targets[-1].tolist() == [0] and not lists.histories.lengths[-1] and not lists.bought[-1].any()
    shown = feedback(lists)
    assert len(shown) == len(lists.baskets) and shown.slots[ITEM_ID].null_count() == 0 and isinstance(lists.vocab, Vocab)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_DATA", str(shop(tmp_path / "data")))
    asked = ["baskets", "--seeds", "0", "--windows", "2", "--depth", "20", "--results", str(tmp_path / "r"), "--home", str(tmp_path / "home"), "--json"]
    done = CliRunner().invoke(bench_app, asked)
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "r" / "baskets.json").read_text())
    assert (tmp_path / "r" / "baskets.png").stat().st_size > 10_000 and len(kept["in_words"]) in (7, 8)
    assert set(kept["models"]) == {"popular", "frequency", "covisit", "retrieval", "ranker, old counts", "ranker", "ranker for money"}
    assert kept["models"]["ranker"]["recall@10"]["mean"] > kept["models"]["popular"]["recall@10"]["mean"] and json.loads(done.stdout.splitlines()[-1])["baskets"] == kept["baskets"]
