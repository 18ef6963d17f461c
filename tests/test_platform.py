"""What `recsys up` does before it starts: which home, which shop, what it refuses."""
from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from recsys.lake.tables import Lake
from recsys.models import bundle
from recsys.ops import platform
from recsys.ops.platform import PlatformError
from recsys.schema import EVENTS
from recsys.settings import Home, load
from recsys.simulator import Size
from recsys.synth import shop

NOW, SMALL = 1_780_000_000_000, Size(shoppers=60, items=40, days=5)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RECSYS_HOME", "RECSYS_PLATFORM_HOME"): monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_two_shops_get_two_homes(here: Path):
    first, settings = platform.choose_home(None, demo=True, own=False)
    platform.fill_demo(first, settings, size=SMALL, now=NOW)
    assert first.path == here / ".recsys"
    assert platform.choose_home(None, demo=True, own=False)[0] == first
    own, settings = platform.choose_home(None, demo=False, own=True)
    assert own.path == here / ".recsys-own" and settings.platform.home == str(own.path)
    assert platform.choose_home(None, demo=False, own=False)[0] == first


def test_a_shop_of_ones_own_first(here: Path):
    own, _ = platform.choose_home(None, demo=False, own=True)
    Lake(own.lake).append("events", shop().events)
    assert own.path == here / ".recsys" and platform.choose_home(None, demo=False, own=True)[0] == own
    assert platform.choose_home(None, demo=True, own=False)[0].path == here / ".recsys-demo"


def test_a_named_home_is_never_mixed(here: Path):
    home, settings = platform.choose_home(here / "named", demo=True, own=False)
    file = here / "events.parquet"
    shop().events.write_parquet(file)
    platform.fill_demo(home, settings, size=SMALL, now=NOW)
    with pytest.raises(PlatformError, match="--home"):
        platform.prepare(home, settings, demo=None, data=file, format="parquet", now=NOW, say=print)
    other = Home.open(here / "other")
    Lake(other.lake).append("events", shop().events)
    with pytest.raises(PlatformError, match="--home"):
        platform.prepare(other, load(home=other.path), demo=SMALL, data=None, format=None, now=NOW, say=print)


def test_an_empty_home_says_how_to_begin(here: Path):
    home = Home.open(here / "empty")
    with pytest.raises(PlatformError, match="--demo"): platform.prepare(home, load(home=home.path), demo=None, data=None, format=None, now=NOW, say=print)


def test_what_was_refused_is_said_at_the_start(here: Path):
    file, said, home = here / "events.parquet", [], Home.open(here / "own")
    pl.concat([shop().events, shop().events.head(1).with_columns(event_id=pl.lit("bad"), price=pl.lit(-1.0))]).select(list(EVENTS)).write_parquet(file)
    platform.prepare(home, load(home=home.path), demo=None, data=file, format="parquet", now=NOW, say=said.append)
    assert "1 quarantined" in said[0] and bundle.champion(home.registry) is not None


def test_one_port_for_two_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RECSYS_GATEWAY_PORT", "8866")
    home = Home.open(here / "home")
    with pytest.raises(PlatformError, match="asked for twice"): platform.preflight(home, load(home=home.path))


def test_a_full_disk_is_said_in_one_line(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "LEAST_FREE_MB", 10**9)
    home = Home.open(here / "home")
    with pytest.raises(PlatformError, match=r"MB of disk left.*--home"): platform.preflight(home, load(home=home.path))


def test_a_process_that_is_told_again_and_again_stops():
    code = "from recsys.ops.supervise import told_to_stop; stop = told_to_stop(); print('up', flush=True)\nwhile not stop.wait(1e-4): pass"
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout and child.stdout.readline() == "up\n"
            for n in range(200):
                if child.poll() is None: child.send_signal((signal.SIGTERM, signal.SIGINT)[n % 2])
            assert child.wait(60) in (0, -signal.SIGINT, -signal.SIGTERM)  # the latter where one comes while the interpreter ends


LOUD = "import os, sys, time; print(f'last words of {os.getpid()}', flush=True); os.write(2, b'x' * 5000); time.sleep(0.3); os.kill(os.getpid(), 9)"
SUPERVISED = """
import sys, threading, os, signal, pathlib
from recsys.ops import supervise
died = set()
def notice(what, name, pid):
    if what == "ended" and len(died | {pid}) > len(died):
        died.add(pid)
        if len(died) >= 12: os.kill(os.getpid(), signal.SIGTERM)
supervise.run([supervise.Process(n, [sys.executable, "-c", sys.argv[2]]) for n in ("a", "b", "c")], host="127.0.0.1", port=0, logs=pathlib.Path(sys.argv[1]), notice=notice)
print(*died)
"""


def test_the_last_words_of_what_dies_are_kept_and_it_comes_back(tmp_path: Path):
    "Three processes that die all the time: their pipes' numbers are used again and again, and circus must not take a new one for an old one."
    done = subprocess.run([sys.executable, "-c", SUPERVISED, tmp_path, LOUD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = "".join(path.read_text() for path in tmp_path.glob("[abc].log*"))
    assert all(f"last words of {pid}" in said for pid in done.stdout.split()) and len(done.stdout.split()) >= 12
    assert "added twice" not in done.stderr and not [p for p in tmp_path.glob("supervisor.log") if "added twice" in p.read_text()]
