"""The features benchmark at tiny sizes: every row is there, equal to Feast's answers, and a wrong answer gives no figures."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from recsys.bench import feature_stores, features
from recsys.bench.features import RULES, BenchError, Sizes, judged
from recsys.cli.bench import bench_app

TINY = Sizes(users=40, reads=20, seconds=0.5, pushed=40, candidates=20, slates=2, rows=50, frame=400, feast_frame=100, matrix=500)
ONLINE = {name for name in RULES if not name.startswith(("training", "item"))}


def test_the_command_ends_with_every_figure_and_what_is_held(tmp_path: Path):
    words = [w for name in ("users", "reads", "seconds", "pushed", "candidates", "rows", "frame", "feast_frame", "matrix") for w in (f"--{name.replace('_', '-')}", str(getattr(TINY, name)))]
    done = CliRunner().invoke(bench_app, ["features", *words, "--stores", "sqlite", "--repeats", "1", "--results", str(tmp_path / "r"), "--home", str(tmp_path / "home"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert {r["name"] for r in told["rows"]} == set(RULES) and told["sizes"]["frame"] == 400 and told["machine"]["versions"]["feast"]
    assert all(math.isfinite(r["ours"]) and r["ours"] > 0 and (r["held"] is None) == (r["limit"] == "") for r in told["rows"])
    assert told["held"] == all(r["held"] for r in told["rows"] if r["held"] is not None)
    compared = {r["name"] for r in told["rows"] if r["ratio"] is not None}
    assert compared == {n for n in RULES if n.startswith(("user row, p50", "candidates", "rows pushed", "training frame, beside"))}
    raw = json.loads(Path(told["files"][0]).read_text())
    assert all(len(r["rounds"]["ours"]) == 1 for r in raw["rows"]) and Path(told["files"][1]).stat().st_size > 1000
    assert list((tmp_path / "home/work/bench").iterdir()) == []  # stores are removed
    assert len(features.lines(raw)) == len(raw["rows"])


@pytest.mark.redis
def test_redis_is_measured_by_the_same_rows(tmp_path: Path):
    with feature_stores.both("redis", tmp_path) as pair:
        rows = feature_stores.online(pair, tmp_path / "items", sizes=TINY, repeats=1, seed=1)
    assert {r["name"] for r in rows} == ONLINE and {r["store"] for r in rows} == {"redis"}


def test_a_second_process_shares_the_matrix(tmp_path: Path):
    files, both = features.matrix(tmp_path, sizes=replace(TINY, matrix=40_000), repeats=1, seed=0)
    assert files["ours"] > 40_000 * 32 * 4 / 1e6 and both["second_resident_mb"] > 0.9 * 40_000 * 32 * 4 / 1e6
    assert both["second_private_mb"] < 0.5 * files["ours"]  # pages of the files are not its own


class Wrong:
    "Feast's store, or any, with one answer changed."

    def __init__(self, of: Any, **changed: Any):
        self.__dict__.update(_of=of, **changed)

    def __getattr__(self, name: str) -> Any: return getattr(self._of, name)


class Told:
    def __init__(self, told: dict[str, list]): self._told = told

    def to_dict(self) -> dict[str, list]: return self._told


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[feature_stores.Both]:
    "Stores with rows, in which Feast answers something else."
    with feature_stores.both("sqlite", tmp_path) as made:
        def other(refs: list[str], entities: list[dict]) -> Told: return Told({r.partition(":")[2]: [-1] * len(entities) for r in refs})
        yield replace(made, feast=Wrong(made.feast, get_online_features=other))


def test_other_answers_give_no_figures(pair: feature_stores.Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from recsys.features.online import write_rows
    users = features.names("u", 40)
    write_rows(pair.ours, features.USER_WINDOWS, features.rows_of(features.USER_WINDOWS, users, ts=1_767_225_600_000, seed=0))
    with pytest.raises(BenchError, match="other features of u"): feature_stores.reads(pair, users, sizes=TINY, repeats=1, seed=0)
    items = features.names("i", 40)
    known = features.rows_of(features.ITEM_WINDOWS, items, ts=1_767_225_600_000, seed=0)
    with pytest.raises(BenchError, match="matrix gives other features"): feature_stores.candidates(pair, items, tmp_path / "items", rows=known, sizes=TINY, repeats=1, seed=0)
    monkeypatch.setattr(features, "historical", lambda asked, service, **_: asked)
    with pytest.raises(BenchError, match="get_historical_features"): features.frames(tmp_path / "frames", sizes=TINY, repeats=1, seed=0)


def test_what_cannot_be_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BenchError, match="--stores mysql: no such online store"), feature_stores.both("mysql", tmp_path): pass
    with pytest.raises(BenchError, match="take more of these"): feature_stores.features(tmp_path, sizes=replace(TINY, candidates=41))
    monkeypatch.setattr(feature_stores, "server", lambda: None)
    assert feature_stores.installed() == ("sqlite",)
    with pytest.raises(BenchError, match="--stores sqlite"), feature_stores.redis_server(tmp_path): pass
    with pytest.raises(BenchError, match="exit code 3"), features.child_of("raise SystemExit(3)") as child: features.line_of(child)
    monkeypatch.setattr(feature_stores, "server", lambda: "/bin/false")
    with pytest.raises(BenchError, match="does not answer"), feature_stores.redis_server(tmp_path): pass


def test_what_a_process_of_the_benchmark_pushes_arrives(tmp_path: Path):
    with feature_stores.both("sqlite", tmp_path) as made:
        with features.child_of(feature_stores.PUSH, made.home.path, made.online, 5, 10, 1) as child:
            assert features.line_of(child) == "ready" and json.loads(features.line_of(child))["rows"] == 10
        from recsys.features.definitions import RETRIEVAL_V1
        from recsys.features.online import Reader
        reader = Reader(made.ours, RETRIEVAL_V1)
        assert any(reader.user(u, now=time.time_ns() // 1_000_000).user_seq is not None for u in features.names("u", 5))


@pytest.mark.parametrize(("name", "ours", "theirs", "ratio", "held"), [
    ("user row, p50", [1.3], [1.0], 1.3, True), ("user row, p50", [1.4, 1.4, 1.0], [1.0, 1.0, 1.0], 1.4, False),
    ("candidates for ranking", [1.0, 1.0], [50.0, 50.0], 50, True), ("candidates for ranking", [1.0], [49.0], 49, False),
    ("rows pushed, updates", [5000.0], [100.0], 50, True), ("rows pushed, updates", [4999.0], [1.0], 4999, False),
    ("training frame, beside Feast", [1.0], [4.0], 4, True), ("training frame", [5.0], [], None, True), ("item matrix, files", [40.1], [], None, False)])
def test_limits_hold_at_their_edges(name: str, ours: list[float], theirs: list[float], ratio: float | None, held: bool):
    row = judged(name, "x", ours, theirs)
    assert (row["ratio"], row["held"]) == (ratio, held)


def test_worlds_are_the_same_again_even_or_popular(tmp_path: Path):
    even, lake = features.world(tmp_path / "a", 400, even=True, seed=3)
    assert even.equals(features.world(tmp_path / "b", 400, even=True, seed=3)[0])
    assert even["item_id"].value_counts()["count"].to_list() == [features.EACH] * 20 == even["user_id"].value_counts()["count"].to_list()
    popular, _ = features.world(tmp_path / "c", 400, even=False, seed=3)
    assert np.asarray(popular["item_id"].value_counts()["count"]).max() > features.EACH
    rows = lake.scan("item_windows").collect()
    assert not rows.select("item_id", "ts").is_duplicated().any() and (rows["ts"] % 300_000 == 0).all() and isinstance(rows, pl.DataFrame)
