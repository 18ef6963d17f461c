"""Ingest: the counts add up whatever the file holds, a second time adds nothing, a crash costs nothing, and no user id is stored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys.lake.eventlog import SQLiteEventLog
from recsys.lake.formats import read
from recsys.lake.ingest import Report, continue_numbers, ingest
from recsys.lake.known import Known, event_ids
from recsys.lake.sources import SourceError
from recsys.lake.tables import Lake
from recsys.lake.vault import Vault
from recsys.schema import (
    EVENT_ID,
    EVENT_RULES,
    EVENTS,
    FIELD,
    IN_STOCK,
    ITEM_ID,
    ITEMS,
    KNOWN_TS,
    LINE,
    ORIGIN,
    PRICE,
    RAW,
    RULE,
    SEQ,
    TITLE,
    TS,
    USER_ID,
    first_broken,
)
from recsys.synth import DAY, T0, shop

DATA = Path(os.environ.get("RECSYS_DATA", Path(__file__).parents[2] / "shared" / "data"))
NOW = T0 + 30 * DAY


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault.open(tmp_path / "keys")


def adds_up(report: Report, lake: Lake, *, events: int | None = None) -> Report:
    assert report.read == report.accepted + report.duplicates + report.quarantined
    if events is not None:
        assert lake.rows("events") == events
    return report


EVENT = {"event_id": "e", "user_id": "ann", "item_id": "mug", "type": "view", "ts": T0}
HOSTILE: dict[str, tuple[dict, str | None]] = {  # what is changed, and the field that is refused (None: accepted)
    "fine": ({}, None),
    "SQL": ({"item_id": "'; DROP TABLE events; --"}, None),
    "SQL user": ({"user_id": "x' OR '1'='1"}, None),
    "unicode": ({"user_id": "Ωμέγα ☕", "item_id": "чашка"}, None),
    "right to left": ({"item_id": "\u202etxt"}, None),
    "path": ({"item_id": "../../etc/passwd"}, None),
    "NUL": ({"item_id": "a\0b"}, "item_id"),
    "NUL user": ({"user_id": "a\0"}, "user_id"),
    "no user": ({"user_id": None}, "user_id"),
    "empty user": ({"user_id": ""}, "user_id"),
    "long id": ({"item_id": "x" * 257}, "item_id"),
    "very long id": ({"user_id": "x" * 50_000}, "user_id"),
    "negative price": ({"price": -0.01}, "price"),
    "huge price": ({"price": 1e308}, "price"),
    "price word": ({"price": "cheap"}, "price"),
    "price of text": ({"price": "4.50"}, None),
    "1969": ({"ts": -1}, "ts"),
    "2999": ({"ts": 32_472_144_000_000}, "ts"),
    "huge ts": ({"ts": 10**30}, "ts"),
    "half a ms": ({"ts": T0 + 0.5}, "ts"),
    "ts in seconds": ({"ts": T0 // 1000}, "ts"),
    "date": ({"ts": "2026-01-01"}, "ts"),
    "no ts": ({"ts": None}, "ts"),
    "type": ({"type": "steal"}, "type"),
    "no item": ({"item_id": None}, "item_id"),
    "search": ({"item_id": None, "type": "search"}, None),
    "return": ({"quantity": -1}, "quantity"),
    "pandas count": ({"quantity": 2.0}, None),
    "half": ({"quantity": 1.5}, "quantity"),
    "currency": ({"currency": "euro"}, "currency"),
    "context": ({"context": {"page": "home"}}, None),
    "personal": ({"context": {"email": "ann@example.org"}}, "context"),
    "no context": ({"context": "not json"}, "context"),
    "deep": ({"context": {"page": {"a": {}}}}, "context"),
    "id too long": ({"event_id": "e" * 129}, "event_id"),
    "session": ({"session_id": "s" * 300}, "session_id"),
    "answer": ({"recommendation_id": "r" * 65}, "recommendation_id"),
}


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_each_hostile_value_is_refused_by_its_field_and_the_rest_is_taken(format: str, tmp_path: Path, lake: Lake, vault: Vault):
    records = [{**EVENT, "event_id": f"e{n}", **change} for n, (change, _) in enumerate(HOSTILE.values())]
    path = tmp_path / f"hostile.{format}"
    if format == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in records))
    else:
        text = [{k: None if r.get(k) is None else r[k] if isinstance(r[k], str) else json.dumps(r[k]) for k in EVENTS} for r in records]
        frame = pl.DataFrame(text, schema={k: pl.String for k in EVENTS})
        frame.write_csv(path) if format == "csv" else frame.write_parquet(path)
    wanted = {n: field for n, (_, field) in enumerate(HOSTILE.values())}
    if format == "csv":
        wanted[list(HOSTILE).index("NUL user")] = "user_id"
    first = 2 if format == "csv" else 1
    report = adds_up(ingest(path, format, lake=lake, vault=vault, now=NOW), lake)
    held = dict(lake.scan("quarantine").select(pl.col(LINE) - first, FIELD).collect().iter_rows())
    assert held == {n: field for n, field in wanted.items() if field} and report.read == len(HOSTILE)
    assert not any(first_broken(row, EVENT_RULES, now=NOW) for row in lake.scan("events").collect().iter_rows(named=True))
    row = lake.scan("quarantine").filter(pl.col(FIELD) == "price").collect().row(0, named=True)
    assert b"ann" in vault.unseal(row[RAW]) and row[ORIGIN] == path.name and row[USER_ID] == vault.pseudonym("ann")


@given(
    lines=st.lists(
        st.one_of(st.binary(max_size=60), st.sampled_from([b"GOOD", b'{"user_id": "bob"}', b'{"ts": 1}', b'{"user_id":"\\ud800","ts":1}'])),
        max_size=25,
    ),
    rows=st.integers(1, 9),
)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_end_with_counts_that_add_up(lines: list[bytes], rows: int, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("any")
    lake, vault = Lake(folder / "lake"), Vault.open(folder / "keys")
    body = [json.dumps({**EVENT, "event_id": f"e{n}"}).encode() if line == b"GOOD" else line for n, line in enumerate([b"GOOD", *lines])]
    (folder / "a.jsonl").write_bytes(b"\n".join(body))
    report = adds_up(ingest(folder / "a.jsonl", "jsonl", lake=lake, vault=vault, now=NOW, batch_rows=rows), lake)
    again = adds_up(ingest(folder / "a.jsonl", "jsonl", lake=lake, vault=vault, now=NOW, batch_rows=rows), lake, events=report.accepted)
    assert (
        report.accepted == lines.count(b"GOOD") + 1
        and again.accepted == 0
        and again.quarantined == report.quarantined == lake.rows("quarantine")
    )


def visits(folder: Path, *, ids: bool = True) -> Path:
    events = shop().events.select("event_id", "user_id", "session_id", "item_id", "type", "ts", "price")
    (events if ids else events.drop("event_id")).write_csv(folder / "visits.csv")
    return folder / "visits.csv"


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("at", range(6))
def test_a_crash_at_any_commit_costs_nothing(at: int, ids: bool, tmp_path: Path, lake: Lake, vault: Vault, monkeypatch: pytest.MonkeyPatch):
    path = visits(tmp_path, ids=ids)
    with path.open("a") as file:
        file.write("broken\n")
    commits, real = [0], Lake.append

    def append(self: Lake, *a: object, **k: object) -> int:
        commits[0] += 1
        if commits[0] > at:
            raise KeyboardInterrupt
        return real(self, *a, **k)  # type: ignore[arg-type]

    with monkeypatch.context() as m:
        m.setattr(Lake, "append", append)
        with pytest.raises(KeyboardInterrupt):
            ingest(path, "csv", lake=lake, vault=vault, now=NOW, batch_rows=5)
    n = shop().events.height
    report = adds_up(ingest(path, "csv", lake=lake, vault=vault, now=NOW, batch_rows=5), lake, events=n)
    assert report.read == n + 1 and lake.rows("quarantine") == 1 and report.quarantined == 1
    assert lake.scan("events").collect()[EVENT_ID].n_unique() == n


def test_kill_9_in_the_middle_and_again(tmp_path: Path, lake: Lake, vault: Vault):
    path = tmp_path / "many.csv"
    path.write_text("user_id,item_id,type,ts\n" + "".join(f"u{n % 97},i{n % 31},view,{T0 + n}\n" for n in range(20_000)))
    code = (
        "import sys; from pathlib import Path; from recsys.lake.ingest import ingest; from recsys.lake.tables import Lake; from recsys.lake.vault import Vault; f = Path(sys.argv[1]);"
        f"ingest(f / 'many.csv', 'csv', lake=Lake(f / 'lake'), vault=Vault.open(f / 'keys'), now={NOW}, batch_rows=200)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 60
    while (lake.version("events") or 0) < 5 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = lake.rows("events")
    report = adds_up(ingest(path, "csv", lake=lake, vault=vault, now=NOW), lake, events=20_000)
    assert 0 < before < 20_000 and report.duplicates == before, "the child was killed in the middle, and what it did was recognised"


def test_ids_do_not_depend_on_batches_and_hide_the_user(tmp_path: Path, vault: Vault):
    path = visits(tmp_path, ids=False)

    def ids(name: str, rows: int) -> list[str]:
        lake = Lake(tmp_path / name)
        ingest(path, "csv", lake=lake, vault=vault, now=NOW, batch_rows=rows)
        return sorted(lake.scan("events").collect()[EVENT_ID])

    assert ids("a", 1) == ids("b", 7) == ids("c", 50_000)
    other = Lake(tmp_path / "other")
    ingest(path, "csv", lake=other, vault=Vault.open(tmp_path / "other keys"), now=NOW)
    assert not set(other.scan("events").collect()[EVENT_ID]) & set(ids("a", 1)), (
        "ids are made of the pseudonym: without the key nobody can make them"
    )


def test_mending_a_line_of_a_sequence_keeps_the_ids_of_the_others(tmp_path: Path, lake: Lake, vault: Vault):
    path = tmp_path / "s.txt"
    path.write_text("u a b\nbroken\nw c\n")
    ingest(path, "sequences", lake=lake, vault=vault, now=NOW)
    path.write_text("u a b\nv d\nw c\n")
    report = adds_up(ingest(path, "sequences", lake=lake, vault=vault, now=NOW), lake, events=4)
    assert (report.accepted, report.duplicates) == (1, 3)


def test_duplicates_within_the_file_across_batches_and_between_files(tmp_path: Path, lake: Lake, vault: Vault):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({**EVENT, "event_id": f"e{n % 10}"}) for n in range(35)))
    report = adds_up(ingest(path, "jsonl", lake=lake, vault=vault, now=NOW, batch_rows=7), lake, events=10)
    assert (report.accepted, report.duplicates) == (10, 25)
    path.write_text(json.dumps({**EVENT, "event_id": "e3"}) + "\n" + json.dumps({**EVENT, "event_id": "new"}))
    assert ingest(path, "jsonl", lake=lake, vault=vault, now=NOW).accepted == 1


def test_equal_lines_without_ids_are_two_events(tmp_path: Path, lake: Lake, vault: Vault):
    (tmp_path / "a.csv").write_text("user_id,item_id,type,ts\n" + f"ann,mug,view,{T0}\n" * 3)
    assert ingest(tmp_path / "a.csv", "csv", lake=lake, vault=vault, now=NOW).accepted == 3


def test_no_raw_user_id_is_stored_anywhere(tmp_path: Path, lake: Lake, vault: Vault):
    secret = "wombat-4711-user"
    path = tmp_path / "a.csv"
    path.write_text(
        f"user_id,session_id,item_id,type,ts,price\n{secret},{secret}-s,mug,view,{T0},1\n{secret},,mug,view,{T0},-1\n{secret},\n"
    )
    log = SQLiteEventLog(tmp_path / "eventlog")
    ingest(path, "csv", lake=lake, vault=vault, log=log, now=NOW)
    log.close()
    stored = [p for p in tmp_path.rglob("*") if p.is_file() and p != path]
    assert len(stored) > 4 and not [p for p in stored if secret.encode() in p.read_bytes()]
    for table in ("events", "quarantine"):
        assert secret not in str(lake.scan(table).collect().to_dicts())
    assert lake.scan("events").collect()["session_id"][0] == vault.pseudonym(f"{secret}-s", kind="session")


def test_known_at(tmp_path: Path, lake: Lake, vault: Vault):
    path = visits(tmp_path)
    ingest(path, "csv", lake=lake, vault=vault, now=NOW, known_at="now")
    assert set(lake.scan("events").collect()[KNOWN_TS]) == {NOW}
    with pytest.raises(ValueError, match="known_at = 'then'"):
        ingest(path, "csv", lake=lake, vault=vault, now=NOW, known_at="then")  # type: ignore[arg-type]


def test_the_event_log_knows_the_latest_of_each_user_even_after_a_crash_before_the_seed(tmp_path: Path, lake: Lake, vault: Vault):
    path = visits(tmp_path)
    ingest(path, "csv", lake=lake, vault=vault, now=NOW)  # as if it died before the seed
    log = SQLiteEventLog(tmp_path / "eventlog")
    ingest(path, "csv", lake=lake, vault=vault, now=NOW, log=log, history=3)
    history = log.history(vault.pseudonym("ann"))
    log.close()
    assert history.item_ids == ["pot", "pot", "kettle"] and history.ts == sorted(history.ts)


def test_items_of_a_catalogue_once_and_when_they_change(tmp_path: Path, lake: Lake, vault: Vault):
    path, clock = tmp_path / "items.jsonl", count(NOW)

    def put(*rows: dict) -> Report:
        path.write_text("\n".join(json.dumps(r) for r in rows))
        return adds_up(ingest(path, "items", lake=lake, vault=vault, now=next(clock)), lake)

    mug = {"item_id": "mug", "title": "Mug", "price": 4.0, "in_stock": True, "attributes": {"colour": "red"}}
    first = put(
        mug,
        mug,
        {"item_id": "pot", "price": -1},
        {"title": "nameless"},
        {**mug, "item_id": "tin", "ts": -5},
        {**mug, "item_id": "cup", "attributes": "no json"},
    )
    assert (first.accepted, first.duplicates, first.quarantined, first.items) == (1, 1, 4, 1)
    assert set(lake.scan("quarantine").collect()[FIELD]) == {PRICE, ITEM_ID, TS, "attributes"}
    assert put(mug).duplicates == 1
    assert put({**mug, "in_stock": False}).accepted == 1 and put(mug).accepted == 1, "what changed back is news"
    dated = {**mug, "ts": T0}
    assert put(dated).accepted == 1 and put(dated).accepted == 0
    assert lake.scan("items").collect().schema == pl.Schema(ITEMS)


def test_a_source_that_knows_the_catalogue_counts_it_apart(tmp_path: Path, lake: Lake, vault: Vault):
    (tmp_path / "ratings.dat").write_text("1::10::5::978300760\n1::11::x::978300760\n")
    (tmp_path / "movies.dat").write_bytes("10::Amélie (2001)::Comedy\n".encode("latin-1") + b"broken\n")
    report = adds_up(ingest(tmp_path / "ratings.dat", "movielens", lake=lake, vault=vault, now=NOW), lake, events=1)
    assert (report.read, report.accepted, report.quarantined, report.items) == (4, 2, 2, 1) and lake.scan("items").collect()[TITLE][
        0
    ] == "Amélie (2001)"
    assert dict(lake.scan("quarantine").select(ORIGIN, FIELD).collect().iter_rows()) == {"movies.dat": "line", "ratings.dat": "value"}
    invoices = {
        "Description": ["MUG", "MUG"],
        "Quantity": [1, -1],
        "InvoiceDate": pl.Series([T0, T0]).cast(pl.Datetime("ms")),
        "UnitPrice": [2.0, 2.0],
        "CustomerID": [17850.0, None],
        "Country": ["France"] * 2,
    }
    pl.DataFrame(invoices).write_parquet(tmp_path / "retail.parquet")
    retail = adds_up(ingest(tmp_path / "retail.parquet", "online-retail", lake=lake, vault=vault, now=NOW), lake, events=2)
    assert (retail.read, retail.accepted, retail.quarantined, retail.items) == (2, 1, 1, 1)


def test_retailrocket_stock_becomes_true_and_false(tmp_path: Path, lake: Lake, vault: Vault):
    (tmp_path / "item_properties_part1.csv").write_text(
        "timestamp,itemid,property,value\n1433041200000,1,categoryid,7\n1433041200000,1,888,n5.0\n1433645900000,1,available,0\n"
    )
    (tmp_path / "events.csv").write_text(
        "timestamp,visitorid,event,itemid,transactionid\n1433221332117,5,view,1,\n1433221332117,5,jump,1,\n"
    )
    report = adds_up(ingest(tmp_path / "events.csv", "retailrocket", lake=lake, vault=vault, now=NOW), lake, events=1)
    assert lake.scan("items").sort(TS).collect()[IN_STOCK].to_list() == [None, False] and report.quarantined == 1
    assert any("1 rows of other properties" in note for note in report.notes)


def test_a_cut_file_ends_with_counts_and_says_where(tmp_path: Path, lake: Lake, vault: Vault):
    import gzip

    body = gzip.compress(b"".join(b"user%d item%d\n" % (n, n * n) for n in range(5000)))
    (tmp_path / "a.gz").write_bytes(body[:-2000])
    report = adds_up(ingest(tmp_path / "a.gz", "sequences", lake=lake, vault=vault, now=NOW), lake)
    assert report.ended_early and "a.gz, line" in report.ended_early and 0 < report.accepted < 5000
    (tmp_path / "a.gz").write_bytes(body)
    adds_up(ingest(tmp_path / "a.gz", "sequences", lake=lake, vault=vault, now=NOW), lake, events=5000)
    with pytest.raises(SourceError):
        ingest(tmp_path / "none", "csv", lake=lake, vault=vault, now=NOW)


def test_progress_rises_to_the_end(tmp_path: Path, lake: Lake, vault: Vault):
    done: list[float] = []
    ingest(visits(tmp_path), "csv", lake=lake, vault=vault, now=NOW, batch_rows=5, progress=done.append)
    assert done == sorted(done) and done[-1] == 1.0


@given(batches=st.lists(st.lists(st.integers(0, 60).map(str), max_size=30), max_size=12))
@settings(max_examples=60, deadline=None)
def test_known_is_a_set(batches: list[list[str]]):
    known, truth = Known(), set()
    for texts in batches:
        new = []
        for text in texts:
            new.append(text not in truth)
            truth.add(text)
        assert known.add(pl.Series(texts, dtype=pl.String)).to_list() == new
    assert len(known) == len(truth)


def test_a_million_made_ids_are_different():
    n = 1_000_000
    frame = pl.select(
        pl.lit(None, pl.String).alias(EVENT_ID),
        (pl.int_range(n) // 7).cast(pl.String).alias("user_id"),
        (pl.int_range(n) % 5).cast(pl.String).alias("item_id"),
        pl.lit("view").alias("type"),
        (pl.int_range(n) // 3).alias("ts"),
        pl.lit(False).alias("ts_is_order"),
        pl.lit(None, pl.Int64).alias("quantity"),
        pl.lit(None, pl.Float64).alias("price"),
        pl.lit(None, pl.Float64).alias("value"),
    )
    ids = event_ids(frame, pl.select(pl.int_range(n) // 2).to_series())
    assert ids.n_unique() == ids.str.head(16).n_unique() == ids.str.tail(16).n_unique() == n


@pytest.mark.real
@pytest.mark.skipif(not DATA.exists(), reason="no data folder: set RECSYS_DATA")
def test_online_retail(tmp_path: Path, lake: Lake, vault: Vault):
    path = DATA / "online-retail/online_retail.parquet"
    report = adds_up(ingest(path, "online-retail", lake=lake, vault=vault, now=NOW), lake, events=406_829)
    assert (report.read, report.quarantined, report.duplicates) == (541_909, 135_080, 0) and report.items == lake.rows("items") > 3800
    assert set(lake.scan("quarantine").collect()[RULE]) == {EVENT_RULES[1].demand}, "lines without a customer"
    again = adds_up(ingest(path, "online-retail", lake=lake, vault=vault, now=NOW), lake, events=406_829)
    assert again.duplicates == 406_829 and again.items == 0 and lake.rows("quarantine") == 135_080
    assert sum(b.read for b in read(path, "online-retail")) == report.read


def test_a_file_takes_a_place_among_live_events_and_a_new_log_goes_on_where_the_lake_ends(tmp_path: Path, lake: Lake, vault: Vault):
    def fill(name: str, log: SQLiteEventLog | None) -> list[int | None]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({**EVENT, "event_id": f"{name}{n}"}) + "\n" for n in range(4)))
        ingest(path, "jsonl", lake=lake, vault=vault, log=log, now=NOW, batch_rows=2)
        return lake.scan("events").filter(pl.col(EVENT_ID).str.starts_with(name)).collect()[SEQ].unique().sort().to_list()
    def live(name: str) -> dict: return {**EVENT, "event_id": name, "user_id": vault.pseudonym("ann"), "known_ts": T0}
    log = SQLiteEventLog(tmp_path / "log")
    assert fill("past", None) == [None]
    assert log.append([live("x")]).last_seq == 1
    first = fill("a", log)
    last = log.append([live("y")]).last_seq
    assert 1 < min(first) <= max(first) < last and lake.scan("events").select(pl.col(SEQ).max()).collect().item() == max(first)
    new = SQLiteEventLog(tmp_path / "new")  # the old one was lost
    assert min(fill("b", new)) > max(first)
    assert new.append([live("z")]).last_seq > max(first)
    other = SQLiteEventLog(tmp_path / "other")
    continue_numbers(lake, other)  # what `recsys up` does before a gateway is there
    assert other.append([live("w")]).last_seq == lake.scan("events").select(pl.col(SEQ).max()).collect().item() + 1
