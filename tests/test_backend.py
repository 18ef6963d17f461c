"""One transformation on every backend that this machine has: whole, in partitions, on Dask workers, on one that dies; and what is refused."""
from __future__ import annotations

import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
from distributed import LocalCluster
from polars.testing import assert_frame_equal

from recsys.prep import backend
from recsys.prep.backend import (
    ClusterError,
    Engine,
    EngineError,
    choose,
    collect,
    fingerprint,
    partition,
    partition_key,
    partitioned,
    run,
    store,
    to_cudf,
    to_torch,
    workers,
)
from recsys.prep.clean import clean, interactions, latest_items
from recsys.prep.sequences import Sequences, ordered
from recsys.prep.sessions import sessions
from recsys.prep.vocab import Vocab, counts
from recsys.schema import EVENT_ID, EVENTS, ITEM_ID, ITEMS, TS, TYPE, USER_ID
from recsys.simulator import Size, World

WORLD = World(Size(300, 100, 6), start_ms=1_767_225_600_000)
ARRIVED = pl.concat(list(WORLD.events())).select(list(EVENTS))
ARRIVED = pl.concat([ARRIVED, ARRIVED.sample(fraction=0.1, seed=1).with_columns(pl.col(TS) + 1)]).sample(fraction=1.0, shuffle=True, seed=2)
CLEAN = clean(ARRIVED.lazy()).collect()
SEEN = interactions(CLEAN.lazy()).collect()
UNITS = {"clean": (clean, ARRIVED), "asof": (partial(clean, asof=int(ARRIVED[TS].median())), ARRIVED), "interactions": (interactions, CLEAN),
         "sessions": (sessions, CLEAN), "counts": (counts, SEEN), "ordered": (partial(ordered, vocab=Vocab.build(SEEN, minimum=3)), SEEN),
         "latest_items": (latest_items, WORLD.items.select(list(ITEMS)))}


def in_files(frame: pl.DataFrame, folder: Path, *, of: int = 3) -> list[Path]:
    paths = [folder / f"{n}.parquet" for n in range(of)]
    for n, path in enumerate(paths): frame[n * frame.height // of:(n + 1) * frame.height // of].write_parquet(path)
    return paths


@pytest.fixture(scope="module")
def client():
    with workers("local", count=2, memory="1GB") as client: yield client

# --- the engine


@pytest.mark.parametrize("devices, installed, usable", [(0, True, False), (1, False, False), (1, True, True)])
def test_the_engine_is_chosen_by_the_driver_and_the_library(devices, installed, usable, monkeypatch, caplog):
    monkeypatch.setattr(backend, "cuda_devices", lambda: (devices, f"{devices} CUDA devices"))
    monkeypatch.setattr(backend, "find_spec", lambda name: object() if installed else None)
    with caplog.at_level(logging.INFO, logger="recsys.prep"): assert choose("auto").name == ("gpu" if usable else "cpu")
    assert f"{devices} CUDA devices" in caplog.text and "engine" in caplog.text
    assert choose("cpu").name == "cpu"
    if usable: assert choose("gpu").name == "gpu"
    else:
        with pytest.raises(EngineError, match=f"{devices} CUDA devices.*cudf-polars is {'' if installed else 'not '}installed.*recsys\\[gpu\\]"): choose("gpu")
        with pytest.raises(EngineError): collect(pl.LazyFrame({"a": [1]}), engine="gpu")
    with pytest.raises(ValueError, match="auto, cpu, gpu"): choose("cuda")


def test_the_probe_never_raises_and_says_what_it_did(monkeypatch):
    count, words = backend.cuda_devices()
    assert count >= 0 and words

    class Driver:
        def __init__(self, name): pass
        def cuInit(self, flags): return 100
    monkeypatch.setattr(backend.ctypes, "CDLL", Driver)
    assert backend.cuda_devices() == (0, "the CUDA driver does not start (cuInit gave 100)")
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 0)
    monkeypatch.setattr(Driver, "cuDeviceGetCount", lambda self, at: setattr(at._obj, "value", 3) or 0, raising=False)
    assert backend.cuda_devices() == (3, "3 CUDA devices")


def test_cudf_is_refused_on_the_cpu():
    with pytest.raises(EngineError, match="to_pandas"): to_cudf(pl.LazyFrame({"a": [1]}), engine=Engine("cpu", "as asked"))


def test_sequences_reach_torch_without_a_copy(tmp_path):
    torch = pytest.importorskip("torch")
    rows = Sequences.from_lists([[3, 1], [], [2]])
    values, offsets = to_torch(rows)
    assert values.dtype == torch.int32 and offsets.dtype == torch.int64 and values.tolist() == [3, 1, 2] and offsets.tolist() == [0, 2, 2, 3]
    rows.values[0] = 9
    assert values[0] == 9  # the same memory
    rows.write(tmp_path)
    assert to_torch(Sequences.read(tmp_path))[0].tolist() == [9, 1, 2]

# --- partitions


def test_the_partition_of_a_key_is_a_promise():
    keys = pl.DataFrame({"text": ["ann", "bob", "☕", "", None], "number": [0, 1, -1, 2**62, None]})
    assert keys.select(partition("text", 7), partition("number", 7)).to_dict(as_series=False) == {"text": [5, 3, 2, 1, 2], "number": [3, 6, 4, 1, 2]}


@pytest.mark.parametrize("threads", ["1", "3"])
def test_other_processes_agree(threads):
    code = "from recsys.prep.backend import fingerprint; print(fingerprint())"
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | {"POLARS_MAX_THREADS": threads}, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(fingerprint())


@pytest.mark.parametrize("name", UNITS)
def test_neither_partitions_nor_files_nor_slices_change_the_answer(name, tmp_path):
    unit, frame = UNITS[name]
    whole = unit(frame.lazy()).collect()
    one = run(unit, frame)
    assert_frame_equal(one, whole, check_row_order=False)
    paths = in_files(frame, tmp_path)
    for n, rows in ((1, 10**6), (2, 700), (7, 500)):
        assert run(unit, paths, partitions=n, rows=rows).equals(one)
        assert run(unit, frame.lazy(), partitions=n, rows=rows).equals(one)
    if partition_key(unit) == USER_ID: assert one.equals(whole)  # units by user order their rows: the whole is the same to the last row
    assert run(unit, frame, per_file=unit).equals(one) if unit is clean else True


@pytest.mark.parametrize("name", UNITS)
def test_no_rows(name, tmp_path):
    unit, frame = UNITS[name]
    assert run(unit, frame.clear(), partitions=3).equals(unit(frame.clear().lazy()).collect())
    frame.clear().write_parquet(tmp_path / "empty.parquet")
    frame.write_parquet(tmp_path / "rows.parquet")
    assert run(unit, [tmp_path / "empty.parquet", tmp_path / "rows.parquet"], partitions=2).equals(run(unit, frame))


def test_stored_partitions_are_the_next_units_files(tmp_path):
    paths = store(clean, ARRIVED, tmp_path / "clean", partitions=3, rows=1000)
    assert [p.name for p in paths] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert run(sessions, paths, partitions=2).equals(sessions(CLEAN.lazy()).collect())
    assert {p.name for p in (tmp_path / "clean").iterdir()} == {p.name for p in paths}  # no drafts are left


def test_wrong_uses_are_refused():
    with pytest.raises(TypeError, match="no partition key"): run(lambda frame: frame, CLEAN)
    with pytest.raises(ValueError, match="partitions = 0"): run(sessions, CLEAN, partitions=0)
    with pytest.raises(EngineError): run(sessions, CLEAN, engine="gpu") if choose().name == "cpu" else choose("nothing")
    with pytest.raises(ClusterError, match="allowed are none, local"): run(sessions, CLEAN, cluster="yarn")

# --- Dask


@pytest.mark.parametrize("name", UNITS)
def test_workers_give_the_same_answer(name, client, tmp_path):
    unit, frame = UNITS[name]
    assert run(unit, in_files(frame, tmp_path), cluster=client, partitions=3, rows=900).equals(run(unit, frame))


def test_a_frame_may_be_given_to_workers_of_this_machine(client, tmp_path):
    assert run(sessions, CLEAN.lazy(), cluster=client).equals(run(sessions, CLEAN))
    assert run(sessions, store(clean, ARRIVED, tmp_path, cluster=client, partitions=2), cluster=client).equals(run(sessions, CLEAN))


def test_local_workers_listen_on_loopback_speak_tls_and_have_a_limit(client):
    info = client.scheduler_info()
    assert client.scheduler.address.startswith("tls://127.0.0.1:") and all(address.startswith("tls://127.0.0.1:") for address in info["workers"])
    assert [w["memory_limit"] for w in info["workers"].values()] == [10**9] * 2
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening and set(listening) == {"127.0.0.1"}
    anyone = ssl.create_default_context()
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    port = int(client.scheduler.address.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as plain, anyone.wrap_socket(plain) as unknown, pytest.raises(ssl.SSLError, match="(?i)certificate"):
        while unknown.recv(1 << 16): pass  # another user of this machine has no certificate


@partitioned(by=USER_ID)
def fatal(events: pl.LazyFrame, *, mark: str) -> pl.LazyFrame:
    "Kills the worker it runs on, the first time."
    try: Path(mark).touch(exist_ok=False)
    except FileExistsError: return sessions(events)
    os.kill(os.getpid(), signal.SIGKILL)
    return events


@partitioned(by=USER_ID)
def wrong(events: pl.LazyFrame) -> pl.LazyFrame: return events.select("no-such-column")


def test_a_killed_worker_changes_nothing(client, tmp_path):
    unit = partial(fatal, mark=str(tmp_path / "mark"))
    before = set(client.scheduler_info()["workers"])
    assert run(unit, in_files(CLEAN, tmp_path), cluster=client, partitions=4, rows=500).equals(run(sessions, CLEAN))
    client.wait_for_workers(2, timeout=120)
    assert (tmp_path / "mark").exists() and set(client.scheduler_info()["workers"]) != before


def test_a_units_own_error_reaches_the_caller(client):
    with pytest.raises(pl.exceptions.ColumnNotFoundError, match="no-such-column"): run(wrong, CLEAN, cluster=client)


def test_a_worker_that_hashes_otherwise_is_refused():
    class Fellows:
        def run(self, function): return {"tls://127.0.0.1:1": function(), "tls://127.0.0.1:2": ("0.1", function()[1])}
    with pytest.raises(ClusterError, match="127.0.0.1:2 has Polars 0.1.*install the same"): backend._agree(Fellows())  # type: ignore[arg-type]


def test_a_scheduler_that_runs_already_is_used_by_its_address():
    with LocalCluster(n_workers=1, processes=False, host="127.0.0.1", dashboard_address="127.0.0.1:0", protocol="tcp") as running:
        assert run(sessions, CLEAN, cluster=running.scheduler_address, partitions=2).equals(run(sessions, CLEAN))


def test_a_frame_stays_away_from_workers_elsewhere():
    class Far:
        def scheduler_info(self): return {"address": "tls://10.0.0.5:8786", "workers": {}}
    with pytest.raises(ClusterError, match="files that all of them read"): run(sessions, CLEAN, cluster=Far())  # type: ignore[arg-type]


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with workers("local", count=1, memory="1GB") as client:
        folder, = tmp_path.glob("recsys-dask-*")
        assert folder.stat().st_mode & 0o077 == 0  # spilled rows are nobody else's
        pids = list(client.run(os.getpid).values())
        with pytest.raises(pl.exceptions.ColumnNotFoundError): run(wrong, CLEAN, cluster=client)
    assert not list(tmp_path.glob("recsys-*")) and not any(map(psutil.pid_exists, pids))


def test_none_needs_no_client():
    with workers("none") as nobody: assert run(counts, SEEN, cluster=nobody).equals(run(counts, SEEN))
    assert np.array_equal(run(counts, SEEN)[ITEM_ID].to_numpy(), np.sort(SEEN[ITEM_ID].unique().to_numpy()))
    assert CLEAN[EVENT_ID].is_unique().all() and TYPE in CLEAN.columns

# --- the pipeline


@pytest.mark.long
def test_prepare_gives_the_same_files_on_workers(tmp_path):
    from recsys.lake.tables import Lake
    from recsys.notebooks import execute
    from recsys.settings import Home, root
    home = Home.open(tmp_path / "home")
    Lake(home.lake).append("events", ARRIVED)
    Lake(home.lake).append("items", WORLD.items.select(list(ITEMS)))
    for cluster in ("none", "local"):
        (home.path / "settings.ini").write_text(f"[prep]\nengine = cpu\ncluster = {cluster}\n")
        execute(root() / "nbs" / "pipelines" / "prepare.ipynb", tmp_path / f"{cluster}.ipynb", {"home": str(home.path), "run_id": cluster}, minutes=3)
        assert f"cluster {cluster}" in (tmp_path / f"{cluster}.ipynb").read_text()
    for name in ("interactions", "items", "vocab"):
        assert pl.read_parquet(home.work / "local" / f"{name}.parquet").equals(pl.read_parquet(home.work / "none" / f"{name}.parquet")), name
