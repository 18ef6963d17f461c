"""What `recsys up` does before it starts: which home, which shop, what it refuses."""
from __future__ import annotations

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
