"""The lake under several writers, wrong frames, and time."""
from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.lake.tables import TABLES, Lake, LakeConflict, LakeError, checked, equals
from recsys.schema import EVENT_ID, EVENTS, IMPRESSIONS, ITEM_ID, PRICE, RECOMMENDATION_ID, SLOTS, TS, USER_ID
from recsys.synth import shop

SHOP = shop()


@pytest.fixture
def lake(tmp_path: Path) -> Lake: return Lake(tmp_path / "lake")


APPENDER = """
import sys
from recsys.lake.tables import Lake
from recsys.synth import shop
lake, me, times = Lake(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.stdin.read(1)
import polars as pl
for n in range(times):
    lake.append("events", shop().events.with_columns(event_id=pl.lit(f"{me}-{n}-") + pl.col("event_id")), mark=(me, n + 1))
"""


def test_several_processes_append_at_once(lake: Lake):
    processes = [subprocess.Popen([sys.executable, "-c", APPENDER, lake.root, str(n), "5"], stdin=subprocess.PIPE, text=True) for n in range(4)]
    for process in processes:
        assert process.stdin
        process.stdin.write("x"); process.stdin.flush()
    for process in processes: process.communicate(timeout=300)
    assert [process.returncode for process in processes] == [0] * 4
    ids = lake.scan("events").select(EVENT_ID).collect()[EVENT_ID]
    assert len(ids) == ids.n_unique() == lake.rows("events") == 4 * 5 * SHOP.events.height
    assert [lake.mark("events", str(n)) for n in range(4)] == [5] * 4


def test_of_two_writers_of_one_name_one_goes_on(lake: Lake):
    "Both read the same mark; what they add overlaps. Exactly one of them may write."
    def write(n: int) -> str:
        try: Lake(lake.root).append("events", SHOP.events, mark=("mover", 23 + n), follows=0)
        except LakeConflict: return "told"
        return "wrote"
    lake.append("events", SHOP.events.head(0))
    with ThreadPoolExecutor(8) as pool: outcomes = sorted(pool.map(write, range(8)))
    # one that finds a mark at or above its own has nothing to add, and says so by doing nothing
    assert lake.rows("events") == SHOP.events.height and outcomes.count("wrote") >= 1


def test_a_writer_that_lost_its_note_does_not_write_twice(lake: Lake):
    for _ in range(3): lake.append("events", SHOP.events, mark=("mover", 23), follows=0)
    assert lake.rows("events") == 23 and lake.mark("events", "mover") == 23 and lake.mark("events", "other") is None
    with pytest.raises(LakeConflict, match="is at 23, these rows follow 7"): lake.append("events", SHOP.events, mark=("mover", 46), follows=7)


def test_reads_as_of_a_version_and_a_time(lake: Lake):
    moments = []
    for part in SHOP.events.iter_slices(8):
        lake.append("events", part)
        time.sleep(0.02)
        moments.append(lake.history("events")[0]["timestamp"] + 1)
    assert [lake.scan("events", at=at).collect().height for at in (0, *moments)] == [0, 8, 16, 23]
    assert [lake.scan("events", version=v).collect().height for v in range(4)] == [0, 8, 16, 23]
    assert lake.dataset("events", version=2).count_rows() == 16
    with pytest.raises(ValueError, match="version 9 is not there; there are 0 to 3"): lake.scan("events", version=9)
    with pytest.raises(ValueError, match="not both"): lake.scan("events", version=1, at=1)


@pytest.mark.parametrize("table", TABLES)
def test_a_table_without_rows_reads_as_an_empty_frame(lake: Lake, table: str):
    empty = pl.DataFrame(schema=dict(TABLES[table]))
    assert lake.scan(table).collect().equals(empty) and lake.rows(table) == 0 and lake.version(table) is None and lake.mark(table, "x") is None
    assert lake.history(table) == [] and lake.delete(table, "1 = 1") == 0 and lake.compact(table)["files"] == 0 and lake.dataset(table).count_rows() == 0
    lake.append(table, empty)
    assert lake.scan(table).collect().schema == empty.schema and lake.rows(table) == 0 and lake.dataset(table).count_rows() == 0
    assert lake.version(table) == 0  # no commit for nothing


@pytest.mark.parametrize("change,message", [
    (lambda f: f.drop(TS), "ts is missing"), (lambda f: f.with_columns(colour=pl.lit("red")), "colour is unknown"),
    (lambda f: f.with_columns(pl.col(TS).cast(pl.Float64)), "ts is Float64, must be Int64"),
    (lambda f: f.with_columns(pl.lit(None).alias(PRICE)), "price is Null, must be Float64")])
def test_a_frame_of_other_columns_is_refused_by_name(lake: Lake, change, message: str):
    with pytest.raises(ValueError, match=message): lake.append("events", change(SHOP.events))
    assert lake.version("events") is None
    with pytest.raises(ValueError, match="no such table; there are events, items"): lake.append("event", SHOP.events)


def test_the_first_batch_does_not_fix_the_schema(lake: Lake):
    "Every optional column null, every list empty: the case in which an inferred schema goes wrong."
    bare = pl.DataFrame([{RECOMMENDATION_ID: "r1", TS: 1, SLOTS: []}], schema=IMPRESSIONS)
    full = pl.DataFrame([{RECOMMENDATION_ID: "r2", TS: 2, USER_ID: "u", SLOTS: [{ITEM_ID: "mug", "score": 0.5, "rank": 1, "source": "popular", "propensity": 1.0}]}],
                        schema=IMPRESSIONS)
    lake.append("impressions", bare)
    lake.append("impressions", full)
    back = lake.scan("impressions").sort(TS).collect()
    assert back.schema == pl.Schema(IMPRESSIONS) and back.equals(pl.concat([bare, full]))


def test_columns_in_another_order_are_fine(lake: Lake):
    lake.append("events", SHOP.events.select(reversed(list(EVENTS))))
    assert lake.scan("events").sort(EVENT_ID).collect().equals(SHOP.events.sort(EVENT_ID))
    assert checked("events", SHOP.events.select(reversed(list(EVENTS)))).columns == list(EVENTS)


def test_compaction_keeps_the_answer_the_mark_and_the_past(lake: Lake):
    for n, part in enumerate(SHOP.events.iter_slices(1)): lake.append("events", part, mark=("mover", n + 1))
    before = lake.version("events")
    counts = lake.compact("events")
    assert counts["joined"] == 23 and counts["files"] == 1 and counts["dropped"] == 0
    assert lake.scan("events").sort(EVENT_ID).collect().equals(SHOP.events.sort(EVENT_ID)) and lake.rows("events") == 23
    assert lake.mark("events", "mover") == 23 and lake.scan("events", version=before).collect().height == 23 == lake.scan("events", version=23).collect().height
    assert lake.scan("events", version=5).collect().height == 5
    assert lake.compact("events")["joined"] == 0  # nothing to gain


def test_appends_deletes_and_compactions_do_not_disturb_each_other(lake: Lake):
    "delta-rs alone doubles every row when two compactions meet."
    lake.append("events", SHOP.events.head(0))
    def add(n: int) -> None: Lake(lake.root).append("events", SHOP.events.with_columns(event_id=pl.lit(f"{n}-") + pl.col(EVENT_ID)))
    def remove(n: int) -> None: Lake(lake.root).delete("events", equals(EVENT_ID, [f"{n - 2}-e00"]))
    def tidy(n: int) -> None: Lake(lake.root).compact("events", full=True)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit((add, add, tidy, tidy, remove)[n % 5], n) for n in range(30)]: future.result()
    rows = lake.scan("events").select(EVENT_ID).collect()[EVENT_ID]
    assert len(rows) == rows.n_unique() and len(rows) + sum(f"{n}-e00" not in rows for n in range(30) if n % 5 < 2) == 12 * 23


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_a_text_never_becomes_sql(tmp_path_factory: pytest.TempPathFactory, text: str):
    lake = Lake(tmp_path_factory.mktemp("lake"))
    lake.append("events", SHOP.events.with_columns(user_id=pl.when(pl.col(USER_ID) == "ann").then(pl.lit(text)).otherwise(pl.col(USER_ID) + "|" + text)))
    assert lake.delete("events", equals(USER_ID, [text])) == 5
    assert lake.rows("events") == 18


def test_trouble_names_the_place(tmp_path: Path):
    (tmp_path / "lake").write_text("not a folder")
    with pytest.raises(LakeError, match=str(tmp_path / "lake")): Lake(tmp_path / "lake").append("events", SHOP.events)


def test_a_damaged_log_is_an_error_and_not_an_empty_table(lake: Lake):
    lake.append("events", SHOP.events)
    for entry in Path(lake.root, "events", "_delta_log").glob("*.json"): entry.write_text("{")
    with pytest.raises(LakeError): lake.scan("events")
