"""The two scripts that speak of a GPU, as far as a machine without one can test them: `make gpu-plan` and `make gpu-check` run them in full."""
from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from recsys.prep.backend import choose

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check
spec.loader.exec_module(gpu_check)


def script(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, timeout=300)


def test_the_check_finds_the_cpu_equal_to_itself(tmp_path):
    done = script("--engine", "cpu", "--events", "3000", "4000", "--repeats", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "gpu_check.json").read_text())
    assert said["equal"] and {r["events"] for r in said["results"]} == {3000, 4000}
    assert {r["unit"].split("(")[0] for r in said["results"]} == set(gpu_check.units())
    assert all(r["equal"] and r["rows_out"] and r["engine_seconds"] and not r["error"] for r in said["results"])
    assert [s["equal"] for s in said["sequences"] if s["torch"]] in ([], [True, True])
    assert "clean.clean" in (tmp_path / "gpu_check.txt").read_text()


@pytest.mark.skipif(choose().name == "gpu", reason="here is a GPU: make gpu-check")
def test_without_a_gpu_it_says_what_it_probed_and_fails(tmp_path):
    done = script("--out", str(tmp_path))
    assert done.returncode == 1 and re.search("not run.*CUDA.*cudf-polars is", done.stderr) and not list(tmp_path.iterdir())


def test_a_wrong_answer_is_found():
    want = pl.DataFrame({"id": ["a", "b", None], "n": [1, 2, 3], "x": [1.0, math.nan, None]})
    assert gpu_check.difference(want, want.clone()) == gpu_check.difference(want, want.reverse()) == 0
    assert gpu_check.difference(want, want.with_columns(pl.col("x") * (1 + 1e-15))) == pytest.approx(1e-15, rel=0.5)
    for wrong in (want.with_columns(n=pl.Series([1, 2, 4])), want.head(2), want.with_columns(x=pl.lit(None, dtype=pl.Float64)), want.with_columns(pl.col("n").cast(pl.Int32)),
                  want.with_columns(pl.col("x").fill_nan(0.0)), want.drop("x")):
        assert gpu_check.difference(want, wrong) is None
    unit = SimpleNamespace(n=0)

    def unsteady(frame: pl.LazyFrame) -> pl.LazyFrame:
        unit.n += 1
        return frame.with_columns(pl.col("n") + unit.n)
    found = gpu_check.compared(gpu_check.Case("unsteady", unsteady, lambda: want), events=3, engine="cpu", repeats=1)
    assert not found.equal and "NO" in gpu_check.table([found])


def test_an_engine_that_refuses_is_a_finding_not_a_crash():
    frame = pl.DataFrame({"n": [1]})
    found = gpu_check.compared(gpu_check.Case("any", lambda lf: lf, lambda: frame), events=1, engine="no such", repeats=1)
    assert not found.equal and "ValueError" in found.error and "ValueError" in gpu_check.table([found])


def test_a_unit_without_an_example_is_refused(monkeypatch):
    monkeypatch.setattr(gpu_check, "units", lambda: {"new.unit": None})
    with pytest.raises(LookupError, match="new.unit.*examples"): gpu_check.cases(*gpu_check.made(100))


def test_the_planning_environment_has_the_line_of_the_extra_and_the_pins_of_the_platform():
    def pins(name: str) -> dict[str, str]: return dict(line.split("==") for line in (ROOT / name).read_text().split() if "==" in line)
    ours, base = pins("constraints-gpu.txt"), pins("constraints.txt")
    assert all(ours[n] == base[n] for n in ("polars", "numpy")) and f"cudf-polars-cu13=={ours['cudf-polars-cu13'].rpartition('.')[0]}.*" in (ROOT / "pyproject.toml").read_text()
