"""Sources and formats against hostile and real files: nothing but SourceError is raised, every record is counted, and memory stays bounded."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from recsys.lake.fields import _parse_slowly, fields, json_lines
from recsys.lake.formats import FORMATS, read
from recsys.lake.sources import MOST_RAW, Batch, SourceError, text_lines
from recsys.schema import (
    EVENTS,
    ITEM_ID,
    ITEMS,
    PURCHASE,
    QUANTITY,
    RATING,
    REMOVE,
    SESSION_ID,
    TS,
    TS_IS_ORDER,
    TYPE,
    USER_ID,
    VALUE,
    VIEW,
)

DATA = Path(os.environ.get("RECSYS_DATA", Path(__file__).parents[2] / "shared" / "data"))
TEXT = ("jsonl", "csv", "items", "retailrocket", "movielens", "yoochoose", "sequences")
GOOD = {
    "jsonl": b'{"user_id":"ann","item_id":"mug","type":"view","ts":1767225600000}\n',
    "csv": b"user_id,item_id,type,ts\nann,mug,view,1767225600000\n",
    "items": b'{"item_id":"mug","title":"Mug","price":4}\n',
    "retailrocket": b"timestamp,visitorid,event,itemid,transactionid\n1433221332117,1,view,2,\n",
    "movielens": b"1::1193::5::978300760\n",
    "yoochoose": b"1,2014-04-07T10:51:09.277Z,214536502,0\n",
    "sequences": b"ann mug pot\n",
}
slow = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def suffix(format: str) -> str:
    return ".jsonl" if format == "items" else ".txt"


def counted(path: Path, format: str, **options: int) -> tuple[int, list[Batch]]:
    batches = list(read(path, format, **options))
    for batch in batches:
        assert batch.frame.height == len(batch.lines) == batch.source.height, "a row without its line"
        rows = pl.Series([True] * batch.frame.height, dtype=pl.Boolean)
        assert len(batch.raws(rows)) == batch.frame.height and all(len(r.raw) <= MOST_RAW for r in batch.rejects)
    return sum(b.read for b in batches), batches


# --- the same records, however they come ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", TEXT)
def test_gzip_crlf_bom_pipes_and_any_batch_size_give_the_same_rows(format: str, tmp_path: Path):
    head, *body = GOOD[format].splitlines(keepends=True)
    lines = (head + body[0] * 7) if body else head * 7
    plain = tmp_path / f"a{suffix(format)}"
    plain.write_bytes(lines)
    want = pl.concat([b.frame for b in read(plain, format)])
    assert want.height >= 7
    variants = {
        "gz": gzip.compress(lines),
        "two members": gzip.compress(lines[:20]) + gzip.compress(lines[20:]) + b"\0" * 100,
        "crlf": lines.replace(b"\n", b"\r\n"),
        "bom": b"\xef\xbb\xbf" + lines,
        "no end": lines.rstrip(b"\n"),
        "blank lines": b"\n \n" + lines.replace(b"\n", b"\n\n"),
    }
    for name, data in variants.items():
        other = tmp_path / f"b{suffix(format)}"
        other.write_bytes(data)
        for rows in (1, 3, 50_000):
            assert pl.concat([b.frame for b in read(other, format, batch_rows=rows)]).equals(want), (name, rows)
    code = f"import sys, polars as pl; from recsys.lake.formats import read; pl.concat([b.frame for b in read('-', {format!r})]).write_ipc(sys.stdout.buffer)"
    out = subprocess.run([sys.executable, "-c", code], input=variants["gz"], capture_output=True, check=True).stdout
    assert pl.read_ipc(out).equals(want)


def test_lines_are_those_of_the_file(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("user_id,item_id,type,ts\n" + "".join(f"u{n},i,view,{n}\n" if n % 10 else "broken\n" for n in range(2, 1002)))
    batches = list(read(path, "csv", batch_rows=64))
    assert all(int(user[1:]) == line for b in batches for user, line in zip(b.frame[USER_ID], b.lines, strict=True))
    assert [r.line for b in batches for r in b.rejects] == list(range(10, 1002, 10))


# --- hostile files ----------------------------------------------------------------------------------------------------------------------------

NASTY = [
    b"\x00" * 50,
    b"\xff\xfe\xfa",
    b'"',
    b'""""',
    b"'; DROP TABLE events; --",
    b"=cmd()",
    b"," * 40,
    b"::" * 9,
    b"{" * 3000,
    b"[" * 3000,
    b"{}",
    b"null",
    b"1e999",
    b"\x1f\x8b",
    "чашка ☕ \u202e \ufeff".encode(),
    b"a" * 3000,
    b"\r",
    b"\xc3",
    b'{"user_id":"\\ud83d"}',
    b'{"ts":1e400}',
    b'{"a":1}{"a":2}',
    b'{"user_id":',
    b'"b"}',
    b"\x01",
    b"-1",
    b"99999999999999999999",
    b"1::2::3::9223372036854775807",
    b"1\t2\t1e308",
    b"1,9999-99-99T99:99:99Z,5,0",
    b'a,"b,c',
    b"user_id,item_id,type,ts",
]


@pytest.mark.parametrize("format", TEXT)
@given(
    lines=st.lists(
        st.one_of(st.sampled_from(NASTY), st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), st.just(b"GOOD")), max_size=40
    ),
    rows=st.integers(1, 50),
)
@slow
@example(lines=NASTY, rows=1000)
@example(lines=NASTY * 30 + [b"GOOD"] * 200, rows=100)
def test_every_line_of_a_hostile_file_is_counted(format: str, tmp_path: Path, lines: list[bytes], rows: int):
    good = GOOD[format]
    body = good + b"".join((good.splitlines()[-1] if line == b"GOOD" else line) + b"\n" for line in lines)
    path = tmp_path / f"hostile{suffix(format)}"
    path.write_bytes(body)
    read_records, batches = counted(path, format, batch_rows=rows, max_line_bytes=2000)
    if format == "sequences":
        read_records = len({n for b in batches for n in b.lines} | {r.line for b in batches for r in b.rejects})
    assert read_records == sum(map(says_something, body.split(b"\n"))) - (format in ("csv", "retailrocket"))  # the header is no record
    ok = sum(line == b"GOOD" for line in lines) + 1
    assert sum(b.frame.height for b in batches) >= ok * (2 if format == "sequences" else 1)


def says_something(line: bytes) -> bool:
    "A line that is not blank; white space as Unicode has it."
    try:
        return bool(pl.Series([line.decode().rstrip("\r").removeprefix("\ufeff")]).str.contains(r"\S").item())
    except UnicodeDecodeError:
        return True


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_cannot_be_read_is_one_clear_line(format: str, tmp_path: Path):
    def error(path: Path | str) -> str:
        with pytest.raises(SourceError) as e:
            list(read(path, format))
        return str(e.value)

    name = "x.parquet" if format in ("parquet", "online-retail") else f"x{suffix(format)}"
    empty, other = tmp_path / name, tmp_path / f"z_{name}"
    empty.write_bytes(b"")
    assert name in error(empty) and "is empty" in error(empty)
    assert "no such file" in error(tmp_path / f"missing_{name}")
    (tmp_path / f"d_{name}").mkdir()
    assert "is a folder" in error(tmp_path / f"d_{name}")
    for magic in (b"PK\x03\x04....", b"BZh91AY", b"\xff\xfeu\0s\0"):
        other.write_bytes(magic)
        assert other.name in error(other)
    with pytest.raises(SourceError, match="choose one of"):
        read(empty, format + "x")


def test_wrong_columns_are_named(tmp_path: Path):
    cases = {
        "csv": (b"user,item_id,type,ts\n1,2,view,3\n", "'user_id'"),
        "retailrocket": (b"timestamp,visitor,event,itemid\n", "'visitorid'"),
        "yoochoose": (b"SessionId\tItem\tTime\n1\t2\t3\n", "'ItemId'"),
    }
    for format, (body, column) in cases.items():
        (tmp_path / "a.txt").write_bytes(body)
        with pytest.raises(SourceError, match=f"a.txt, line 1: no column {column}; found"):
            list(read(tmp_path / "a.txt", format))
    pl.DataFrame({"user_id": ["a"], "Description": ["b"]}).write_parquet(tmp_path / "a.parquet")
    for format, column in (("parquet", "'item_id', 'type', 'ts'"), ("online-retail", "'Quantity'"), ("items", "'item_id'")):
        with pytest.raises(SourceError, match=f"a.parquet, schema: no column {column}"):
            list(read(tmp_path / "a.parquet", format))


def test_unused_columns_are_noted(tmp_path: Path):
    (tmp_path / "a.csv").write_text("user_id,item_id,type,ts,colour\n1,2,view,3,red\n")
    assert [b.notes for b in read(tmp_path / "a.csv", "csv")] == [("a.csv: columns not used: colour",)]
    (tmp_path / "a.jsonl").write_text('{"user_id": "a", "colour": 1}\n')
    assert [b.notes for b in read(tmp_path / "a.jsonl", "jsonl")] == [("a.jsonl: keys not used: colour",)]


@pytest.mark.parametrize("cut", [1, 5, 30, 200, 1000, -9, -1])
def test_a_gzip_that_was_cut_short_gives_what_it_has(cut: int, tmp_path: Path):
    body = b"".join(b"user%d item%d\n" % (n, n * n) for n in range(3000))
    packed = gzip.compress(body)[:cut]
    (tmp_path / "a.gz").write_bytes(packed)
    if cut == 1:
        return  # a single byte does not look like gzip
    read_records, batches = counted(tmp_path / "a.gz", "sequences", batch_rows=500)
    assert batches[-1].ended_early and "a.gz, line" in batches[-1].ended_early
    got = pl.concat([b.frame for b in batches])
    assert got[ITEM_ID].to_list() == [f"item{n * n}" for n in range(got.height)], "a line that was cut is not passed off as whole"
    assert read_records - got.height in (0, 1)


def test_a_gzip_that_is_damaged_in_the_middle(tmp_path: Path):
    packed = bytearray(gzip.compress(os.urandom(2).hex().encode() + b"".join(b"user%d item%d\n" % (n, n * n) for n in range(20_000))))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "a.gz").write_bytes(bytes(packed))
    _, batches = counted(tmp_path / "a.gz", "sequences")
    assert batches[-1].ended_early


def test_parquet_that_is_damaged_or_odd(tmp_path: Path):
    n = 40_000
    frame = pl.DataFrame(
        {"user_id": [f"u{k * 7919 % n}" for k in range(n)], "item_id": [f"i{k * 31 % n}" for k in range(n)], "type": "view", "ts": range(n)}
    )
    path = tmp_path / "a.parquet"
    frame.write_parquet(path, row_group_size=10_000)
    assert sum(b.read for b in read(path, "parquet", batch_rows=3000)) == n
    data = bytearray(path.read_bytes())
    start = (
        pq.ParquetFile(path).metadata.row_group(2).column(0).dictionary_page_offset
        or pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    )
    data[start : start + 200] = b"\xff" * 200
    path.write_bytes(bytes(data))
    batches = list(read(path, "parquet", batch_rows=3000))
    assert "damaged" in str(batches[-1].ended_early) and 0 < sum(b.read for b in batches) < n
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"an\xff\xfe"))
    pq.write_table(pa.table({"user_id": bad, "item_id": ["a", "b"], "type": ["view"] * 2, "ts": [1, 2]}), path)
    [batch] = read(path, "parquet")
    assert batch.frame[USER_ID].to_list() == ["an"] and [(r.line, r.rule) for r in batch.rejects] == [(2, "must be UTF-8")]
    pl.DataFrame({"user_id": [["a"]], "item_id": ["a"], "type": ["view"], "ts": [1]}).write_parquet(path)
    with pytest.raises(SourceError, match="column 'user_id' holds List"):
        list(read(path, "parquet"))
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    with pytest.raises(SourceError, match="pipe"):
        list(read(fifo, "parquet"))


# --- memory -----------------------------------------------------------------------------------------------------------------------------------

CHILD = """
import resource, sys
from recsys.lake.formats import read
list(read(sys.argv[2], sys.argv[1]))  # warm: imports and first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
batches = list(read("-", sys.argv[1]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(b.read for b in batches), sum(len(b.rejects) for b in batches), (after - before) // 1024)
"""


def long_line(format: str, megabytes: int, tmp_path: Path, *, packed: bool = False) -> list[int]:
    "A good record, a line of so many MB, a good record, through a pipe: records, rejects, MB of memory that it took."
    good, line = GOOD[format], GOOD[format].splitlines(keepends=True)[-1]
    (tmp_path / f"warm{suffix(format)}").write_bytes(good * 1000 if format not in ("csv", "retailrocket") else good)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, format, str(tmp_path / f"warm{suffix(format)}")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin and child.stdout
    sink = gzip.GzipFile(fileobj=child.stdin, mode="wb", compresslevel=1) if packed else child.stdin
    sink.write(good + b'{"user_id":"')
    for _ in range(megabytes):
        sink.write(b"x" * (1 << 20))
    sink.write(b"\n" + line)
    if packed:
        sink.close()
    child.stdin.close()
    out = child.stdout.read()
    assert child.wait(timeout=600) == 0
    return [int(word) for word in out.split()]


@pytest.mark.parametrize("format", ["jsonl", "csv", "sequences"])
def test_a_very_long_line_through_a_pipe_takes_little_memory(format: str, tmp_path: Path):
    records, rejects, megabytes = long_line(format, 200, tmp_path)
    assert rejects == 1 and records == (5 if format == "sequences" else 3) and megabytes < 60


def test_a_gzip_that_unpacks_to_a_huge_line_takes_little_memory(tmp_path: Path):
    assert long_line("jsonl", 300, tmp_path, packed=True)[:2] == [3, 1]


@pytest.mark.long
@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_a_line_of_4_gigabytes_through_a_pipe(format: str, tmp_path: Path):
    records, rejects, megabytes = long_line(format, 4096, tmp_path)
    assert (records, rejects) == (3, 1) and megabytes < 60


# --- the fast paths say what the slow ones say ------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r\x01"), max_size=8), min_size=3, max_size=3),
        min_size=1,
        max_size=20,
    ),
    style=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
)
@slow
def test_csv_agrees_with_the_standard_reader(rows: list[list[str]], style: int, tmp_path: Path):
    sheet = io.StringIO()
    csv.writer(sheet, quoting=style, lineterminator="\n").writerows([[str(n), *row] for n, row in enumerate(rows)])
    (tmp_path / "a.csv").write_text(sheet.getvalue(), newline="")
    [batch] = text_lines(tmp_path / "a.csv")
    got = fields(batch, ["n", "a", "b", "c"], ",", quotes=True)
    assert not got.rejects and got.frame.rows() == [(str(n), *(v or None for v in row)) for n, row in enumerate(rows)]


plain = st.one_of(
    st.none(),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.integers(-(2**70), 2**70),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
)


@given(records=st.lists(st.dictionaries(st.sampled_from([USER_ID, TS, VALUE, "extra"]), plain), min_size=1, max_size=20))
@slow
def test_json_agrees_with_the_standard_reader(records: list[dict], tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    [batch] = text_lines(tmp_path / "a.jsonl")
    got = json_lines(batch, [USER_ID, TS, VALUE])
    frames: list[pl.DataFrame] = []
    text = batch.frame["text"]
    _parse_slowly(text, pl.Series(range(len(text))), {USER_ID: pl.String, TS: pl.String, VALUE: pl.String, "row": pl.Int64}, frames, {})

    def same(a: str | None, b: str | None) -> bool:
        return a == b or (a is not None and b is not None and float(a) == float(b))

    for ours, theirs in zip(got.frame.iter_rows(named=True), frames[0].iter_rows(named=True), strict=True):
        assert all(same(ours[c], theirs[c]) for c in (USER_ID, TS, VALUE)), (ours, theirs)


# --- each format ------------------------------------------------------------------------------------------------------------------------------


def test_columns_are_those_of_the_schema(tmp_path: Path):
    for format in TEXT:
        (tmp_path / f"a{suffix(format)}").write_bytes(GOOD[format])
        for batch in read(tmp_path / f"a{suffix(format)}", format):
            assert set(batch.frame.columns) <= set(EVENTS if batch.table == "events" else ITEMS), format


def test_movielens_scales_seconds_and_refuses_nonsense(tmp_path: Path):
    (tmp_path / "ratings.dat").write_text("1::2::5::978300760\n1::2::5::9223372036854775807\n1::2::5::-1\n1::2::5\n1::2::5::abc\n")
    [batch] = read(tmp_path / "ratings.dat", "movielens")
    assert (
        batch.frame[TS].to_list() == [978_300_760_000, None, -1000, None] and set(batch.frame[TYPE]) == {RATING} and len(batch.rejects) == 1
    )


def test_sequences_keep_the_order_and_say_so(tmp_path: Path):
    (tmp_path / "s.txt").write_text("u a b\nu\nw  c\tb\nu d\n")
    frame = pl.concat([b.frame for b in read(tmp_path / "s.txt", "sequences", batch_rows=1)])
    assert frame.rows() == [
        ("u", "a", VIEW, 1, True),
        ("u", "b", VIEW, 2, True),
        ("w", "c", VIEW, 3, True),
        ("w", "b", VIEW, 4, True),
        ("u", "d", VIEW, 5, True),
    ]


@pytest.mark.real
@pytest.mark.skipif(not DATA.exists(), reason="no data folder: set RECSYS_DATA")
class TestReal:
    def test_online_retail(self):
        records, batches = counted(DATA / "online-retail/online_retail.parquet", "online-retail")
        events = pl.concat([b.frame for b in batches if b.table == "events"])
        assert records == events.height == 541_909 and not any(b.rejects for b in batches)
        bought = events.filter((pl.col(TYPE) == PURCHASE) & pl.col(USER_ID).is_not_null())
        assert bought[USER_ID].n_unique() == 4339 and bought[SESSION_ID].n_unique() == 18_444
        assert (
            events.filter(pl.col(TYPE) == REMOVE)[QUANTITY].min() == 1
            and batches[-1].table == "items"
            and batches[-1].frame[ITEM_ID].is_unique().all()
        )

    def test_ml_1m(self):
        records, batches = counted(DATA / "ml-1m/ml-1m.txt", "sequences")
        events = pl.concat([b.frame for b in batches])
        assert (
            records == 999_611 and events[USER_ID].n_unique() == 6040 and events[ITEM_ID].n_unique() == 3416 and events[TS_IS_ORDER].all()
        )
        records, batches = counted(DATA / "ml-1m/ratings_users1-2999.dat.gz", "movielens")
        items = pl.concat([b.frame for b in batches if b.table == "items"])
        assert records == 487_650 + items.height and items.height == 3883 and "Misérables, Les (1995)" in items["title"].to_list()

    def test_beauty_and_rsc15(self):
        records, batches = counted(DATA / "amazon-beauty/Beauty.txt", "sequences")
        assert records == 198_502 and pl.concat([b.frame for b in batches])[USER_ID].n_unique() == 22_363
        records, batches = counted(DATA / "rsc15-100k/yoochoose-clicks-100k_train_full.txt", "yoochoose")
        assert records == 70_278 and batches[0].frame[TS][0] == 1_396_437_466_940
