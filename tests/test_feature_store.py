"""The feature store of a home: made once, checked by readers, whole after a kill; Feast's answers are the lake's; nothing secret in the settings."""
from __future__ import annotations

import importlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import polars as pl
import pytest
from ports import free_port

from recsys.features import definitions
from recsys.features.definitions import SERVICES, TABLES, VIEWS, View, digest, windowed
from recsys.features.matrix import opened
from recsys.features.store import (
    ITEMS,
    OFFLINE,
    ONLINE,
    REGISTRY,
    StoreError,
    address,
    apply,
    feast,
    materializing,
    open_store,
    recover,
    registered,
    turn,
)
from recsys.lake.tables import Lake
from recsys.schema import TS
from recsys.settings import Home, SettingsError, load
from recsys.synth import T0

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def home(tmp_path: Path) -> Home: return Home.open(tmp_path / "home")


def row(name: str, ts: int, **values: object) -> pl.DataFrame:
    "One row of an offline table: 0 where nothing is said."
    zero = {pl.Int64: 0, pl.Float64: 0.0, pl.String: "x", pl.Boolean: True}
    return pl.DataFrame([{c: values.get(c, ts if c == TS else zero[type(d)]) for c, d in TABLES[name].items()}], schema=dict(TABLES[name]))


def rows_of(home: Home, name: str, *frames: pl.DataFrame) -> Lake:
    lake = Lake(home.features / OFFLINE, tables=TABLES)
    lake.append(name, pl.concat(frames))
    return lake


# --- definitions


def test_names_are_unique_and_a_windowed_view_names_exactly_what_prep_returns():
    names = [f.name for v in VIEWS.values() for f in v.features]
    assert len(names) == len(set(names))
    for v in VIEWS.values():
        if not v.spans: continue
        prefix = v.name.removesuffix("_windows").removesuffix("_popularity")
        expected = windowed(prefix, v.spans, v.measures, v.ratios)
        assert v.features[:len(expected)] == expected and {f.name for f in v.features[len(expected):]} <= set(definitions.MARKS)
        assert all(span % v.grid_ms == 0 for span in v.span_ms.values())


def test_defaults_ages_and_ttl_are_one_rule_for_values_and_frames():
    view = VIEWS["user_windows"]
    assert view.ttl_ms is not None and view.fresh(view.ttl_ms + 5, 5) and not view.fresh(view.ttl_ms + 6, 5), "the edge counts, as with Feast"
    assert view.fresh(0, 10**6), "a row from the future is of age 0"
    frame = pl.DataFrame({"now": [view.ttl_ms + 5, view.ttl_ms + 6], TS: [5, 5]})
    assert frame.select(view.fresh(pl.col("now"), pl.col(TS)))["now"].to_list() == [True, False]
    assert VIEWS["item_catalogue"].fresh(1 << 50, 0)


def test_a_changed_type_default_ttl_or_service_changes_the_fingerprint():
    view = VIEWS["item_catalogue"]
    changes: list[View] = [replace(view, ttl_ms=1), replace(view, features=view.features[:-1]),
                           replace(view, features=(replace(view.features[0], default=0.0), *view.features[1:])),
                           replace(view, features=(replace(view.features[0], dtype=pl.Int64()), *view.features[1:]))]
    assert len({digest({**VIEWS, view.name: c}, None) for c in changes} | {digest()}) == 5


# --- opening


def test_readers_are_told_what_to_run_and_make_nothing(home: Home):
    with pytest.raises(StoreError, match="no feature registry yet: recsys features apply"): open_store(home, load({}), write=False)
    assert not (home.features / REGISTRY).exists() and registered(home) is None
    open_store(home, load({}))
    assert registered(home) == digest()
    reader = open_store(home, load({}), write=False)
    assert {v.name for v in reader.list_feature_views()} == set(VIEWS) and {s.name for s in reader.list_feature_services()} == set(definitions.SERVICES)


def test_definitions_that_changed_without_apply_are_refused_to_readers_and_applied_by_writers(home: Home, monkeypatch: pytest.MonkeyPatch):
    open_store(home, load({}))
    longer = {**VIEWS, "user_windows": replace(VIEWS["user_windows"], ttl_ms=1000)}
    for module in ("recsys.features.definitions", "recsys.features.store"): monkeypatch.setattr(f"{module}.VIEWS", longer)
    with pytest.raises(StoreError, match="made from other definitions.*recsys features apply"): open_store(home, load({}), write=False)
    assert open_store(home, load({})).get_feature_view("user_windows").ttl.total_seconds() == 1
    open_store(home, load({}), write=False)


def test_a_view_that_is_no_longer_defined_goes_and_the_rest_keep_their_rows(home: Home, monkeypatch: pytest.MonkeyPatch):
    store = open_store(home, load({}))
    frame = pd.DataFrame({"category": ["garden"], "event_timestamp": pd.to_datetime([T0], unit="ms", utc=True), "created": pd.to_datetime([T0], unit="ms", utc=True),
                          **{n: [7] for n in VIEWS["category_popularity"].names}})
    store.write_to_online_store("category_popularity", frame)
    fewer = {n: v for n, v in VIEWS.items() if n != "user_category"}
    services = {"retrieval_v1": definitions.SERVICES["retrieval_v1"]}
    for module in ("recsys.features.definitions", "recsys.features.store"):
        monkeypatch.setattr(f"{module}.VIEWS", fewer)
        monkeypatch.setattr(f"{module}.SERVICES", services)
    store = open_store(home, load({}))
    assert {v.name for v in store.list_feature_views()} == set(fewer) and [s.name for s in store.list_feature_services()] == ["retrieval_v1"]
    got = store.get_online_features(["category_popularity:category_events_1d"], [{"category": "garden"}]).to_dict()
    assert got["category_events_1d"] == [7]


def test_a_file_that_is_no_registry_is_named(home: Home):
    (home.features / REGISTRY).write_text("not a database, and long enough to be looked at as one " * 20)
    for write in (True, False):
        with pytest.raises(StoreError, match="not a feature registry"): open_store(home, load({}), write=write)


def test_registry_and_online_store_are_in_wal_mode_and_for_the_owner_alone(home: Home):
    open_store(home, load({}))
    for name in (REGISTRY, ONLINE):
        db = sqlite3.connect(home.features / name)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",), name
        db.close()
    assert home.features.stat().st_mode & 0o077 == 0


def test_two_writers_that_start_together_make_one_registry(home: Home):
    code = "import sys; from recsys.features.store import open_store; from recsys.settings import Home, load; " \
           "print(len(open_store(Home.open(sys.argv[1]), load({})).list_feature_views()))"
    both = [subprocess.Popen([sys.executable, "-c", code, str(home.path)], stdout=subprocess.PIPE, text=True, env=ENV) for _ in range(2)]
    assert [p.communicate(timeout=240)[0].strip() for p in both] == [str(len(VIEWS))] * 2


def test_feast_comes_without_torch_and_torch_can_still_come_later():
    code = "import sys; from recsys.features.store import feast; feast(); assert 'torch' not in sys.modules; import torch; print(torch.ones(1).item())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENV).stdout.strip() == "1.0"


@pytest.mark.parametrize("first", ["recsys.features.online", "recsys.features.redis_store", "recsys.features.lake_store", "recsys.features.updater", "feast"])
def test_whatever_brings_feast_in_our_own_metrics_are_still_told(first: str):
    code = f"""
import os, sys
from recsys.telemetry import counter, exposition
counter("recsys_seen_total", "Seen.").inc()
before = {{k: v for k, v in os.environ.items() if k.startswith("PROMETHEUS_")}}
import {first}
assert "feast" in sys.modules and b"recsys_seen_total 1.0" in exposition()
if {first!r} != "feast": assert "torch" not in sys.modules and before == {{k: v for k, v in os.environ.items() if k.startswith("PROMETHEUS_")}}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert not done.returncode, done.stderr


def test_metrics_that_processes_share_stay_in_their_folder_when_feast_comes(tmp_path: Path):
    code = "from recsys.features import online; from recsys.telemetry import counter, exposition; counter('recsys_seen_total', 'Seen.').inc(); print(exposition().decode())"
    told = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENV | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}).stdout for _ in range(2)]
    assert "recsys_seen_total 2.0" in told[1] and len(list(tmp_path.glob("counter_*.db"))) == 2


# --- killed materialisations


def test_a_killed_materialisation_leaves_no_view_unreadable(home: Home):
    rows_of(home, "category_popularity", row("category_popularity", T0, category="garden", category_events_1d=3))
    settings, states = load({}), feast().FeatureViewState
    store = open_store(home, settings)
    with materializing(store, home): store.materialize(pd.Timestamp(T0, unit="ms", tz="UTC"), pd.Timestamp(T0, unit="ms", tz="UTC"), ["category_popularity"])
    code = """import sqlite3, sys, time
from recsys.features.store import REGISTRY, materializing, open_store, feast
from recsys.settings import Home, load
home = Home.open(sys.argv[1]); store = open_store(home, load({}))
with materializing(store, home), sqlite3.connect(home.features / REGISTRY) as db:
    view = store.get_feature_view("category_popularity"); view.state = feast().FeatureViewState.MATERIALIZING
    db.execute("UPDATE feature_views SET feature_view_proto = ? WHERE feature_view_name = 'category_popularity'", (view.to_proto().SerializeToString(),)); db.commit()
    print("working", flush=True); time.sleep(600)"""
    child = subprocess.Popen([sys.executable, "-c", code, str(home.path)], stdout=subprocess.PIPE, text=True, env=ENV)
    try:
        assert child.stdout is not None and child.stdout.readline().strip() == "working"
        during = open_store(home, settings)  # somebody is at work: the mark stays, and reads go on
        assert during.get_feature_view("category_popularity").state == states.MATERIALIZING
        assert during.get_online_features(["category_popularity:category_events_1d"], [{"category": "garden"}]).to_dict()["category_events_1d"] == [3]
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    after = open_store(home, settings)
    assert after.get_feature_view("category_popularity").state == states.AVAILABLE_ONLINE and recover(home) == []
    assert after.get_online_features(["category_popularity:category_events_1d"], [{"category": "garden"}]).to_dict()["category_events_1d"] == [3]


def test_a_lock_is_held_by_one_and_given_back_by_the_dead(home: Home):
    with turn(home, "x") as first, turn(home, "x", wait=False) as second: assert (first, second) == (True, False)
    with turn(home, "x", wait=False) as again: assert again


# --- Feast's answers from the lake


def test_history_is_as_of_the_time_asked_for_with_the_ttl_edge_included(home: Home):
    ttl = VIEWS["category_popularity"].ttl_ms
    assert ttl is not None
    rows_of(home, "category_popularity", row("category_popularity", T0, category="garden", category_events_1d=1),
            row("category_popularity", T0 + 1000, category="garden", category_events_1d=2))
    store = open_store(home, load({}))
    when = [T0 - 1, T0, T0 + 999, T0 + 1000, T0 + 1000 + ttl, T0 + 1001 + ttl]
    asked = pd.DataFrame({"category": "garden", "event_timestamp": pd.to_datetime(when, unit="ms", utc=True)})
    got = store.get_historical_features(asked, ["category_popularity:category_events_1d"]).to_df().sort_values("event_timestamp")
    assert [None if pd.isna(v) else int(v) for v in got["category_events_1d"]] == [None, 1, 1, 2, 2, None]
    with pytest.raises(ValueError, match="give a frame"): store.get_historical_features("SELECT 1", ["category_popularity:category_events_1d"]).to_df()


def test_rows_that_the_delta_log_has_deleted_are_not_seen(home: Home):
    lake = rows_of(home, "item_catalogue", row("item_catalogue", T0, item_id="mug", item_price=4.0), row("item_catalogue", T0, item_id="pot", item_price=20.0))
    lake.delete("item_catalogue", "item_id = 'mug'")
    store = open_store(home, load({}))
    asked = pd.DataFrame({"item_id": ["mug", "pot"], "event_timestamp": pd.to_datetime([T0, T0], unit="ms", utc=True)})
    got = store.get_historical_features(asked, ["item_catalogue:item_price", "item_catalogue:item_in_stock"]).to_df().set_index("item_id")
    assert pd.isna(got.loc["mug", "item_price"]) and got.loc["pot", "item_price"] == 20.0


def test_pushed_rows_go_online_and_never_into_the_offline_table(home: Home):
    from feast.data_source import PushMode
    store = open_store(home, load({}))
    at = pd.to_datetime([T0 + 5], unit="ms", utc=True)
    frame = pd.DataFrame({"item_id": ["mug"], "item_price": [4.5], "item_in_stock": [True], "item_category": ["home/tea"], "item_brand": ["Synth"],
                          "item_available_from": [T0], "event_timestamp": at, "created": at})
    store.push("item_catalogue_push", frame, to=PushMode.ONLINE)
    assert store.get_online_features(["item_catalogue:item_price"], [{"item_id": "mug"}]).to_dict()["item_price"] == [4.5]
    from recsys.features.lake_store import LakeOfflineStore
    with pytest.raises(NotImplementedError, match="made from the lake alone"):
        LakeOfflineStore.offline_write_batch(store.config, store.get_feature_view("item_catalogue"), None, None)
    assert Lake(home.features / OFFLINE, tables=TABLES).version("item_catalogue") is None


# --- settings


@pytest.mark.parametrize("online", ["redis://127.0.0.1:6379/0", "rediss://recsys@cache.example:6379/0?ssl_ca_certs=/etc/ca.pem", "sqlite"])
def test_where_features_are_read_may_be_sqlite_or_redis(online: str): assert load({"RECSYS_FEATURES_ONLINE": online}).features.online == online


@pytest.mark.parametrize("online", ["mysql://x", "redis", "redis://", "sqlite "])
def test_another_place_is_refused_by_name(online: str):
    with pytest.raises(SettingsError, match=r"\[features\] online"): load({"RECSYS_FEATURES_ONLINE": online})


def test_the_password_comes_from_the_keys_folder(home: Home):
    file, url = home.keys / "redis.password", "rediss://recsys@cache.example:6379/0?ssl_ca_certs=/etc/ca.pem"
    assert address(home, url) == url
    file.write_text("a b/c@\n")
    file.chmod(0o600)
    assert address(home, url) == "rediss://recsys:a%20b%2Fc%40@cache.example:6379/0?ssl_ca_certs=/etc/ca.pem"
    assert address(home, "redis://127.0.0.1") == "redis://:a%20b%2Fc%40@127.0.0.1" and address(home, "sqlite") == "sqlite"
    assert address(home, "rediss://recsys:own@cache.example") == "rediss://recsys:own@cache.example"
    file.chmod(0o640)
    with pytest.raises(StoreError, match="chmod go-rwx"): address(home, url)


# --- commands


def recsys(home: Home, *words: str) -> tuple[int, dict]:
    done = subprocess.run([sys.executable, "-c", "from recsys.cli.main import main; main()", "features", *words, "--json"], capture_output=True, text=True,
                          env={**ENV, "RECSYS_HOME": str(home.path)})
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1])


def test_commands_answer_with_one_json_object(home: Home):
    assert {r["name"] for r in subprocess_list(home)} == {*VIEWS, *definitions.SERVICES}
    assert recsys(home, "show", "nothing")[0] == 1
    assert recsys(home, "apply") == (0, {"definitions": digest(), "views": list(VIEWS)})
    code, said = recsys(home, "parity")
    assert code == 0 and (said["compared"], said["mismatches"]) == (0, 0)


def subprocess_list(home: Home) -> list[dict]:
    code, said = recsys(home, "list")
    assert code == 0
    return said["features"]


def test_what_duckdb_cannot_hold_lies_in_the_home(home: Home):
    rows_of(home, "category_popularity", row("category_popularity", T0))
    store = open_store(home, load({}))
    store.materialize(datetime.fromtimestamp(T0 / 1000 - 1, UTC), datetime.fromtimestamp(T0 / 1000 + 1, UTC), ["category_popularity"])
    with importlib.import_module("ibis").get_backend().con.cursor() as duckdb:
        assert duckdb.execute("SELECT current_setting('temp_directory')").fetchone() == (str(home.work / "duckdb"),)


def test_materialize_brings_the_lake_online(home: Home):
    from recsys.synth import shop
    shop_ = shop()
    lake = Lake(home.lake)
    lake.append("events", shop_.events)
    lake.append("items", shop_.items)
    code, said = recsys(home, "materialize")
    assert code == 0 and {m["view"] for m in said["materialized"]} == set(VIEWS), said
    assert [str(opened(home.features / ITEMS, s).version) for s in SERVICES] == said["items_versions"]
    store = open_store(home, load({}), write=False)
    [price] = store.get_online_features(["item_catalogue:item_price"], [{"item_id": "mug"}]).to_dict()["item_price"]
    assert price == 4.0


def test_the_feast_command_and_its_ui_work_on_the_registry(home: Home):
    import httpx
    open_store(home, load({}))
    env = {**ENV, "RECSYS_HOME": str(home.path)}
    command = [str(Path(sys.executable).parent / "feast"), "-c", str(ROOT / "feature_repo")]
    said = subprocess.run([*command, "feature-views", "list"], capture_output=True, text=True, env=env, check=True).stdout
    assert all(name in said for name in VIEWS)
    port = free_port()
    ui = subprocess.Popen([*command, "ui", "--host", "127.0.0.1", "--port", str(port)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try: answer = httpx.get(f"http://127.0.0.1:{port}/", timeout=5)
            except httpx.HTTPError: time.sleep(0.5)
            else: break
        assert answer.status_code == 200 and "feast" in answer.text.lower()
    finally:
        ui.terminate()
        ui.wait(120)


def test_apply_may_be_repeated(home: Home):
    store = open_store(home, load({}))
    apply(store, home)
    apply(store, home)
    assert registered(home) == digest()
