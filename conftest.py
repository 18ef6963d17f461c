"""Every notebook for people is a test. The lesson cells of a library notebook run against the *exported* module, so that what the reader sees is
what runs; a tutorial and the index run from their first cell."""
from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch: threads of two workers on two cores would wait for each other most of the time

import matplotlib
import matplotlib.pyplot as plt
import pytest
from hypothesis import HealthCheck, settings

matplotlib.use("Agg")
EVER = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # a busy machine is no finding
settings.register_profile("same", derandomize=True, **EVER)  # the same examples each time
settings.register_profile("random", **EVER)  # others each time: `make test-all`
settings.load_profile("same")
EXPORTED = re.compile(r"^#\|\s*(export|exporti|exports|default_exp)\b", re.M)
SKIPPED = re.compile(r"^#\|\s*eval:\s*false", re.M)


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Collector | None:
    if file_path.suffix == ".ipynb" and "pipelines" not in file_path.parts and ".ipynb_checkpoints" not in file_path.parts:
        return Notebook.from_parent(parent, path=file_path)
    return None


class Notebook(pytest.File):
    "One notebook gives one item. Pipelines are left to the tests of the flows, dashboards to those of the page."

    def collect(self):
        cells = [(n, "".join(c["source"])) for n, c in enumerate(json.loads(self.path.read_text())["cells"]) if c["cell_type"] == "code"]
        module = next((m[1] for _, s in cells if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))), None)
        if module is None: yield Lessons.from_parent(self, name="tutorial", cells=cells)
        else:
            yield Lessons.from_parent(self, name=f"recsys.{module}", cells=[c for c in cells if not EXPORTED.search(c[1]) and not SKIPPED.search(c[1])])


class Lessons(pytest.Item):
    "The cells of a notebook that are not exported, in order, in the module's own namespace."

    def __init__(self, *, cells: list[tuple[int, str]], **kw):
        super().__init__(**kw)
        self.cells, self.at = cells, -1

    def runtest(self) -> None:
        module = vars(importlib.import_module(self.name)) if self.name.startswith("recsys.") else {}
        space = dict(module, display=lambda *a, **k: None)
        for at, source in self.cells:
            self.at = at
            exec(compile(source, f"{self.path.name}[cell {self.at}]", "exec"), space)  # noqa: S102  the notebook's own cell
        plt.close("all")

    def repr_failure(self, excinfo, style=None):
        source = dict(self.cells).get(self.at, "")
        return f"{self.path.name}, cell {self.at}:\n{source}\n\n{super().repr_failure(excinfo, style='short')}"

    def reportinfo(self):
        return self.path, 0, f"lessons of {self.name}"


DATA = Path(os.environ.get("RECSYS_DATA", Path(__file__).parent.parent / "shared" / "data"))
PROGRAMS = {"browser": ("chromium",), "redis": ("redis-server", "valkey-server")}


LONGEST = ("test_ring.py", "train_a_ranker.ipynb", "test_pipelines.py", "test_feature_store.py", "test_trainer.py", "test_features_online.py", "test_writer.py",
           "test_bench_features.py", "test_bench.py", "test_features_served.py", "test_platform.py", "test_dashboard.py", "test_flows.py")  # begun first, so that two workers end together


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_runtest_setup(item: pytest.Item) -> None:
    "What a test needs of the machine: skipped where it is absent and cannot be had; a missing program is a failure in CI."
    for marker, programs in PROGRAMS.items():
        if item.get_closest_marker(marker) and not any(map(shutil.which, programs)):
            missing = f"needs {' or '.join(programs)}: make system"
            pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    if item.get_closest_marker("real") and not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set RECSYS_DATA to its folder")


@pytest.fixture(scope="session")
def data() -> Path:
    "The folder of real data."
    return DATA
