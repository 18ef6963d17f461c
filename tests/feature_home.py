"A home with settings of an online store: what several tests of features begin with."
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from recsys.settings import Home, Settings, load


def home_of(path: Path, online: str = "sqlite") -> tuple[Home, Settings]:
    home = Home.open(path / "home")
    settings = load(home=home.path)
    return home, replace(settings, features=replace(settings.features, online=online))
