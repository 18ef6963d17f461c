"""The matrix of items at its size, under writers and readers at once, and after a writer died."""
from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.features.definitions import SERVICES
from recsys.features.items import Layout, Version, pack, pointed, refresh
from recsys.features.matrix import ItemsError, opened
from recsys.schema import ITEM_ID, TS
from recsys.synth import DAY, T0

LAYOUT = Layout("s", ("a", "b"), (0.0, float("nan")), ("v", "w"), {"v": DAY, "w": None})


def frames(n: int, *, ts: int = T0) -> dict[str, pl.DataFrame]:
    ids = [f"i{k}" for k in range(n)]
    return {"v": pl.DataFrame({ITEM_ID: ids, TS: [ts] * n, "a": list(range(n))}, schema_overrides={TS: pl.Int64, ITEM_ID: pl.String}),
            "w": pl.DataFrame({ITEM_ID: ids[: n // 2], TS: [ts] * (n // 2), "b": [k / 3 for k in range(n // 2)]}, schema_overrides={TS: pl.Int64, ITEM_ID: pl.String, "b": pl.Float64})}


@given(n=st.integers(0, 30), asked=st.lists(st.integers(0, 40), max_size=20), age=st.integers(-DAY, 3 * DAY))
@settings(max_examples=30, deadline=None)
def test_rows_are_what_was_packed(tmp_path_factory: pytest.TempPathFactory, n: int, asked: list[int], age: int):
    root = tmp_path_factory.mktemp("items")
    pack(root, LAYOUT, frames(n), asof=T0)
    got = opened(root, "s").rows([f"i{k}" for k in asked], now=T0 + age)
    expected = [[np.float32(k) if k < n and age <= DAY else 0.0, np.float32(k / 3) if k < n // 2 else np.nan] for k in asked]
    np.testing.assert_array_equal(got.values, np.array(expected, np.float32).reshape(-1, 2))
    assert got.age_ms.tolist() == [[max(age, 0) if k < n else -1, max(age, 0) if k < n // 2 else -1] for k in asked]


def test_200k_items_of_32_features_are_under_40_mb(tmp_path: Path):
    names = tuple(f"f{k}" for k in range(32))
    frame = pl.DataFrame({ITEM_ID: [f"item-{k}" for k in range(200_000)], TS: np.full(200_000, T0), **{f: np.arange(200_000) for f in names}})
    pack(tmp_path, Layout("wide", names, (0.0,) * 32, ("v",) * 31 + ("w",), {"v": None, "w": None}), {"v": frame, "w": frame}, asof=T0)
    items = opened(tmp_path, "wide")
    assert items.nbytes < 40 * 2**20 and isinstance(items._matrix.base, np.memmap)
    assert (items.rows(["item-199999"], now=T0).values == 199_999).all()


def test_same_rows_same_version_and_only_some_versions_stay(tmp_path: Path):
    assert pack(tmp_path, LAYOUT, frames(3), asof=T0, mark=5) == pack(tmp_path, LAYOUT, frames(3), asof=T0, mark=5)
    held = opened(tmp_path, "s")
    for n in range(4, 9): pack(tmp_path, LAYOUT, frames(n), asof=T0 + n, mark=n)
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 3
    assert held.rows(["i2"], now=T0).values[0, 0] == 2  # its folder is gone, and it reads on
    assert Version.parse(pointed(tmp_path, "s")).mark == 8


def test_a_writer_that_dies_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = pack(tmp_path, LAYOUT, frames(3), asof=T0)
    monkeypatch.setattr("recsys.features.items.Ids.write", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"): pack(tmp_path, LAYOUT, frames(4), asof=T0 + 1)
    assert pointed(tmp_path, "s") == str(first) and len(opened(tmp_path, "s")) == 4
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".making")]


def test_readers_see_one_version_or_the_other(tmp_path: Path):
    pack(tmp_path, LAYOUT, frames(10), asof=T0)
    failed: list[Exception] = []

    def write() -> None:
        for n in range(11, 31): pack(tmp_path, LAYOUT, frames(n), asof=T0 + n)

    def read() -> None:
        while writer.is_alive():
            try: items = opened(tmp_path, "s")
            except ItemsError as e:
                if pointed(tmp_path, "s") in str(e): failed.append(e)  # else it is three versions old by now
                continue
            if items.rows(["i9"], now=T0).values[0, 0] != 9: failed.append(AssertionError(items.version))
    writer = threading.Thread(target=write)
    readers = [threading.Thread(target=read) for _ in range(2)]
    for t in (writer, *readers): t.start()
    for t in (writer, *readers): t.join()
    assert not failed and len(opened(tmp_path, "s")) == 31


def test_faults_are_named(tmp_path: Path):
    twice = frames(3)
    twice["v"] = pl.concat([twice["v"], twice["v"]])
    with pytest.raises(ValueError, match="more than one row"): pack(tmp_path, LAYOUT, twice, asof=T0)
    with pytest.raises(ValueError, match="column a is missing"): pack(tmp_path, LAYOUT, {**frames(3), "v": frames(3)["v"].drop("a")}, asof=T0)
    with pytest.raises(ValueError, match="no rows of w"): pack(tmp_path, LAYOUT, {"v": frames(3)["v"]}, asof=T0)
    with pytest.raises(ValueError, match="must be <service>"): Version.parse("17")
    assert opened(tmp_path, "s") is None


def test_a_shop_without_events_has_prices(tmp_path: Path):
    from recsys.features.definitions import TABLES
    empty = {name: pl.DataFrame(schema=dict(t)) for name, t in TABLES.items()}
    empty["item_catalogue"] = pl.DataFrame([{ITEM_ID: "mug", TS: T0, "item_price": 4.0, "item_in_stock": True}], schema=dict(TABLES["item_catalogue"]))
    refresh(lambda name: empty[name].lazy(), tmp_path, list(SERVICES.values()), asof=T0)
    items = opened(tmp_path, "retrieval_v1")
    assert dict(zip(items.layout.features, items.rows(["mug"], now=T0).values[0].tolist(), strict=True))["item_price"] == 4.0
