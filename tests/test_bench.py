"""The stop-watch against known work, and the comparison against stand-ins that are equal, wrong, or broken."""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recsys import settings as settings_module
from recsys.bench import harness
from recsys.bench import prep as bench
from recsys.bench.harness import BenchError, Run, exponent, in_turns, measured, summary
from recsys.cli.main import app

ROOT = Path(__file__).parents[1]
EQUAL = "import runpy, sys; sys.argv[0] = {peer!r}; runpy.run_path({peer!r}, run_name='__main__')\n"
WRONG = EQUAL + """
import pathlib, polars as pl
file = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "pairs.parquet"
pl.read_parquet(file).tail(-1).write_parquet(file)
print('{{"rows": 1, "steps": {{}}}}')
"""


PEERS = {"events.py": "c0913be71cde82df", "load.py": "d8933640b1d10968", "prep_check.py": "2d7ec85ddcc47f9e", "prep_duckdb.py": "c1393f90ab4544b8", "prep_pandas.py": "1e5cf23a5506fa17",
         "serve_api.py": "9995eb72337f863b", "serve_fastapi_onnx_faiss.py": "f8955d90d893a065", "serve_fastapi_torch.py": "5e618397853fdf34",
         "train_plain.py": "c0d2ae1b7be0f238"}  # figures of different days can be compared


def python(code: str) -> list[str]: return [sys.executable, "-c", code]


def checkout(folder: Path, ours: str) -> Path:
    "A checkout of benchmarks alone, with other code in our place."
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / "peers").symlink_to(ROOT / "benchmarks" / "peers")
    (folder / "benchmarks" / "prep_recsys.py").write_text(ours.format(peer=str(ROOT / "benchmarks/peers/prep_duckdb.py")))
    return folder


def test_children_of_a_command_count(tmp_path: Path):
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    run = measured("parent", python(f"import subprocess, sys\nfor _ in range(2): subprocess.run([sys.executable, '-c', {burn!r}], check=True)"), scratch=tmp_path)
    assert 0.6 < run.cpu_s < 3 and run.wall_s >= 0.6 * 0.9 and run.others_cpu_s >= 0 and run.result == {}


def test_the_peak_is_the_commands_own(tmp_path: Path):
    block = bytearray(300_000_000)  # this process is larger than the command
    run = measured("small", python("pass"), scratch=tmp_path)
    assert len(block) and run.peak_rss_gb < 0.1


def test_a_command_that_takes_too_long_leaves_nothing(tmp_path: Path):
    note = tmp_path / "pid"
    sleeper = python(f"import os, time; open({str(note) + '~'!r}, 'w').write(str(os.getpid())); os.rename({str(note) + '~'!r}, {str(note)!r}); time.sleep(600)")
    for limit in (0.5, 5, 50):  # the first, unless the machine is so busy that the command had not begun by then
        with pytest.raises(BenchError, match=f"not done after {limit:g} s"): measured("sleeper", sleeper, scratch=tmp_path, timeout_s=limit)
        if note.exists(): break
    pid = int(note.read_text())
    for _ in range(1000):  # its parent is gone too; whoever reaps it may take a moment
        try: state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError: return
        if state == "Z": return
        time.sleep(0.1)
    raise AssertionError(f"{pid} still runs")


def test_failures_name_the_command(tmp_path: Path):
    for code, said in (("raise SystemExit(7)", "exit code 7"), ("import os; os.kill(os.getpid(), 9)", "exit code")):
        with pytest.raises(BenchError, match=said): measured("ours", python(code), scratch=tmp_path)
    with pytest.raises(BenchError, match="exit code"): measured("ours", ["/no/such/program"], scratch=tmp_path)


def test_turns_and_medians(tmp_path: Path):
    say = [(w, python(f"print('{w}'); print('{{\"rows\": 1}}')")) for w in "ab"]
    seen: list[float] = []
    runs = in_turns(dict(say), repeats=2, scratch=tmp_path, progress=lambda what, done: seen.append(done))
    assert [(r.name, r.repeat) for r in runs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] and seen == [0, 0.25, 0.5, 0.75]
    made = [Run("x", n, cpu, 2 * cpu, gb, 0.0, {"steps": {"s": {"cpu_s": cpu / 2}}}) for n, (cpu, gb) in enumerate([(5.0, 1.0), (1.0, 3.0), (2.0, 2.0)])]
    assert summary(made)["x"] == {"cpu_s": 2.0, "least": 1.0, "most": 5.0, "wall_s": 4.0, "others_cpu_s": 0.0, "peak_rss_gb": 3.0, "steps": {"s": 1.0}}
    assert summary(made, ["s"])["x"]["cpu_s"] == 1.0
    with pytest.raises(BenchError, match="no step 't'; its steps are s"): summary(made, ["t"])
    with pytest.raises(ValueError, match="two different"): exponent([5, 5], [1, 1])


def test_equal_outputs_are_compared(tmp_path: Path):
    report = bench.prep(checkout(tmp_path / "c", EQUAL), tmp_path / "work", events=5000, repeats=2)
    assert report["equal"] and set(report["cpu_seconds"]) == set(report["peak_rss_gb"]) == {"polars", "duckdb", "pandas", "pandas_numpy"}
    assert len(report["runs"]) == 8 and 4000 < report["rows"] < 5000 and report["machine"]["versions"]["duckdb"] and set(report["within"]) == {*bench.LIMITS, "memory"}
    stamp = os.stat(tmp_path / "work/events-5000.parquet").st_mtime_ns
    grown = bench.scaling(tmp_path / "c", tmp_path / "work", sizes=[5000, 10_000])
    assert os.stat(tmp_path / "work/events-5000.parquet").st_mtime_ns == stamp  # made once
    assert [r["events"] for r in grown["sizes"]] == [5000, 10_000] and set(grown["exponents"]) == {"steps_cpu_s", "cpu_s", "peak_rss_gb"}
    kept = bench.keep(report | {"scaling": grown}, tmp_path / "results")
    assert all(Path(f).stat().st_size > 1000 for f in kept["files"]) and len(bench.lines(report)) == 4
    assert json.loads(Path(kept["files"][0]).read_text())["runs"][0]["result"]["steps"]["windows"]["cpu_s"] >= 0


def test_wrong_outputs_give_no_figures(tmp_path: Path):
    with pytest.raises(BenchError, match="prep_check.py: exit code 1: .*polars/pairs.*differs"):
        bench.prep(checkout(tmp_path / "c", WRONG), tmp_path / "work", events=3000, repeats=1)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BenchError, match="run in a checkout"): bench.prep(tmp_path, tmp_path / "work", events=1000)
    monkeypatch.setattr(harness.util, "find_spec", lambda name: None if name == "duckdb" else True)
    with pytest.raises(BenchError, match=r"not installed: duckdb: .*pip install -c constraints.txt -e '.\[dev\]'"): bench.folder_of(ROOT)


def test_the_peers_are_not_changed():
    import hashlib
    digest = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in sorted((ROOT / "benchmarks/peers").glob("*.py"))}
    assert digest == PEERS


def test_the_command_line_ends_with_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert settings_module.root() == ROOT
    done = CliRunner().invoke(app, ["bench", "prep", "--events", "20000", "--repeats", "1", "--dask", "--results", str(tmp_path / "r"), "--home", str(tmp_path / "home"), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(said["cpu_seconds"]) == {"polars", "duckdb", "pandas", "pandas_numpy", "polars_dask"} and said["rows"] > 19_000 and said["equal"]
    assert said["peak_rss_gb"]["polars"] > 0.05 and 0.05 < said["worker_peak_rss_gb"] < 1
