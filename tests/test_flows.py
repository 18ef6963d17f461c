"""Flows under hostile conditions: killed, raced, hung, stopped; on throwaway notebooks."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from recsys.notebooks import NotebookError, execute, parameters_of
from recsys.ops import flows, scheduler
from recsys.ops.flows import FlowError
from recsys.settings import Home, load

PARAMETERS = '''home: str = ".recsys"  # folder of all state
run_id: str = "by-hand"  # names the work folder
result: str = ""  # where the result goes
'''
START = "from pathlib import Path\nfrom recsys.notebooks import finish\nwork = Path(home) / 'work' / run_id\nwork.mkdir(parents=True, exist_ok=True)"
END = "finish(result, {'ok': True})"


def pipeline(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    folder.mkdir(exist_ok=True)
    made = [{"cell_type": "code", "id": f"cell-{n}", "metadata": {"tags": ["parameters"] if n == 0 else []}, "execution_count": None,
             "outputs": [], "source": source} for n, source in enumerate([parameters, *cells])]
    python = {"display_name": "python3", "language": "python", "name": "python3"}
    (folder / f"{name}.ipynb").write_text(json.dumps({"cells": made, "metadata": {"kernelspec": python}, "nbformat": 4, "nbformat_minor": 5}))
    return folder / f"{name}.ipynb"


@pytest.fixture
def place(tmp_path: Path) -> dict[str, Any]:
    pipeline(tmp_path / "steps", "first", START, "(work / 'first').open('a').write('x')", END)
    pipeline(tmp_path / "steps", "second", START, "(work / 'second').open('a').write('x')", END)
    return {"home": Home.open(tmp_path / "home"), "settings": load({}), "runs": tmp_path / "runs", "pipelines": tmp_path / "steps"}


TWO = {"two": ("first", "second"), "one": ("first",)}


def until(what, seconds: float = 120.0) -> None:
    late = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < late, "waited in vain"
        time.sleep(0.05)


def in_another_process(place: dict[str, Any], flow: str = "two") -> subprocess.Popen:
    code = f"""
from pathlib import Path
from recsys.ops import flows, scheduler
from recsys.settings import Home, load
flows.run({flow!r}, {{}}, home=Home(Path({str(place["home"].path)!r})), settings=load({{}}),
          runs=Path({str(place["runs"])!r}), pipelines=Path({str(place["pipelines"])!r}), flows={TWO!r})
"""
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def test_kill_9_in_the_middle_then_resume_continues_after_the_last_finished_step(place):
    home, steps = place["home"], place["pipelines"]
    mark = place["runs"].parent / "kernel.pid"
    pipeline(steps, "second", START, f"import os, time\nPath({str(mark)!r}).write_text(str(os.getpid()))\ntime.sleep(600)", END)
    flow = in_another_process(place)
    until(mark.exists)
    with pytest.raises(FlowError, match=r"flow two cannot start: flow two \(pid \d+\) is running"): flows.run("two", {}, **place, flows=TWO)
    (alive,) = flows.runs_of(home, runs=place["runs"])
    assert alive.status == "running" and alive.alive
    with pytest.raises(FlowError, match="is running"): flows.resume(alive.run_id, **place)
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    (cut,) = flows.runs_of(home, runs=place["runs"])
    assert cut.status == "interrupted" and [s.status for s in cut.steps] == ["done", "running"]
    until(lambda: not psutil.pid_exists(int(mark.read_text())))  # the orphaned kernel ends by itself

    pipeline(steps, "second", START, "(work / 'second').open('a').write('x')", END)
    done = flows.resume(cut.run_id, **place)  # the dead holder's lock does not stand in the way
    assert done.status == "done" and [s.status for s in done.steps] == ["done", "done"]
    work = home.work / cut.run_id
    assert (work / "first").read_text() == "x" and (work / "second").read_text() == "x"
    with pytest.raises(FlowError, match="nothing to resume"): flows.resume(cut.run_id, **place)


def test_resume_starts_over_when_the_work_is_gone(place):
    pipeline(place["pipelines"], "second", "1 / 0")
    with pytest.raises(FlowError, match="ZeroDivisionError"): flows.run("two", {}, **place, flows=TWO)
    (failed,) = flows.runs_of(place["home"], runs=place["runs"])
    (place["home"].work / failed.run_id / "first").unlink()
    (place["home"].work / failed.run_id).rmdir()
    pipeline(place["pipelines"], "second", START, END)
    assert flows.resume(failed.run_id, **place).status == "done"
    assert (place["home"].work / failed.run_id / "first").read_text() == "x"


def test_nothing_runs_when_a_parameter_is_wrong(place):
    for params in ({"home": "x"}, {"run_id": "../../x"}, {"nothing": 1}):
        with pytest.raises(FlowError, match="unknown parameter"): flows.run("two", params, **place, flows=TWO)
    with pytest.raises(FlowError, match="unknown flow 'three'; allowed: two, one"): flows.run("three", {}, **place, flows=TWO)
    assert not place["runs"].exists()


def test_a_step_without_a_result_is_not_done(place):
    pipeline(place["pipelines"], "first", START)
    with pytest.raises(FlowError, match=r"without a result; a pipeline's last cell is finish"): flows.run("one", {}, **place, flows=TWO)
    assert flows.list_runs(place["home"], runs=place["runs"])[0]["stands_at"] == "first"


def test_a_step_that_takes_too_long_is_killed_with_its_children(place):
    mark = place["runs"].parent / "child.pid"
    pipeline(place["pipelines"], "first", "import subprocess, time, pathlib",
             f"pathlib.Path({str(mark)!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid))", "while True: time.sleep(0.5)")
    for minutes in (0.06, 0.5, 3):  # the first, unless the machine is so busy that the kernel had not come up by then
        settings = replace(place["settings"], flow=replace(place["settings"].flow, step_minutes=minutes))
        with pytest.raises(FlowError, match=f"cut off: it took longer than {minutes:g} minutes"): flows.run("one", {}, **{**place, "settings": settings}, flows=TWO)
        if mark.exists(): break
    until(lambda: not psutil.pid_exists(int(mark.read_text())) or psutil.Process(int(mark.read_text())).status() == "zombie")


def test_a_flow_can_be_told_to_stop(place):
    mark, stop = place["runs"].parent / "begun", threading.Event()
    pipeline(place["pipelines"], "first", f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(600)", "1 / 0")
    threading.Thread(target=lambda: (until(mark.exists), stop.set())).start()
    with pytest.raises(FlowError, match="told to stop"): flows.run("one", {}, **place, flows=TWO, stop=stop)
    assert flows.runs_of(place["home"], runs=place["runs"])[0].status == "interrupted"


def test_a_kernel_that_dies_fails_its_step(place):
    pipeline(place["pipelines"], "first", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(FlowError, match="kernel died"): flows.run("one", {}, **place, flows=TWO)


def test_the_kernel_is_this_python_whatever_kernelspec_is_installed(tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = pipeline(tmp_path / "steps", "who", "import os, sys, psutil\nfrom recsys.notebooks import finish",
                        "ports = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == 'LISTEN']",
                        "finish(result, {'python': sys.executable, 'threads': os.environ['OMP_NUM_THREADS'], 'ports': ports})")
    execute(notebook, tmp_path / "copy.ipynb", {"result": str(tmp_path / "who.json")}, minutes=5)
    found = json.loads((tmp_path / "who.json").read_text())
    assert (found["python"], found["threads"]) == (sys.executable, "1")
    assert set(found["ports"]) <= {"127.0.0.1"}  # ipykernel's own, for what child processes print


def test_the_scheduler_keeps_a_missed_run_survives_its_failure_and_stops_when_told(tmp_path):
    home, runs = Home.open(tmp_path / "home"), tmp_path / "runs"
    folder = runs / "20260101-030000-000-retrain"
    folder.mkdir(parents=True)
    flows.write_json(folder / "flow.json", flows.RunResult(folder.name, "retrain", "done", str(home.path), str(folder), 1_767_236_400_000, {}, (), (1, 0.0)))
    stop = threading.Event()
    clock = threading.Thread(target=scheduler.run, args=(home, load({})), kwargs={"stop": stop, "runs": runs})
    clock.start()
    until(lambda: len(flows.runs_of(home, runs=runs)) == 2 and flows.runs_of(home, runs=runs)[0].status == "failed")  # the lake is empty
    assert clock.is_alive()
    stop.set()
    clock.join(120)
    assert not clock.is_alive()
    assert flows.runs_of(home, runs=runs)[0].flow == "retrain"  # no run of the features flow was missed
    off = load({"RECSYS_FLOW_RETRAIN": "", "RECSYS_FEATURES_REFRESH": ""})
    scheduler.run(home, off, stop=stop, runs=runs)  # switched off: waits, and stops when told


def test_features_are_refreshed_between_two_retrains_and_their_lines_are_checked(tmp_path, monkeypatch):
    home, ran, stop = Home.open(tmp_path / "home"), [], threading.Event()
    monkeypatch.setattr(flows, "run", lambda flow, *_, **__: (ran.append(flow), stop.set()))
    folder = tmp_path / "runs" / "20260101-030000-000-features"
    folder.mkdir(parents=True)
    flows.write_json(folder / "flow.json", flows.RunResult(folder.name, "features", "done", str(home.path), str(folder), 1_767_236_400_000, {}, (), (1, 0.0)))
    scheduler.run(home, load({}), stop=stop, runs=tmp_path / "runs")
    assert ran == ["features"]
    with pytest.raises(scheduler.ScheduleError, match=r"\[features\] refresh = 'often'"):
        scheduler.run(home, load({"RECSYS_FEATURES_REFRESH": "often"}), stop=stop, runs=tmp_path / "runs")


def test_frequent_flows_do_not_push_out_the_runs_of_rare_ones(tmp_path):
    home, runs = Home.open(tmp_path / "home"), tmp_path / "runs"
    for n, flow in enumerate(("retrain", *["features"] * 5)):
        folder = runs / f"20260101-00000{n}-000-{flow}"
        folder.mkdir(parents=True)
        (home.work / folder.name).mkdir()
        flows.write_json(folder / "flow.json", flows.RunResult(folder.name, flow, "done", str(home.path), str(folder), n, {}, (), (1, 0.0)))
    flows.prune(home, keep=2, runs=runs)
    assert [r.flow for r in flows.runs_of(home, runs=runs)] == ["features", "features", "retrain"]
    assert sorted(p.name for p in home.work.iterdir()) == ["20260101-000000-000-retrain", "20260101-000005-000-features"]


def test_old_runs_are_pruned_and_other_homes_left_alone(place, tmp_path):
    def written(home: Home, n: int, status: str) -> str:
        folder = place["runs"] / f"20260101-00000{n}-000-one"
        folder.mkdir(parents=True)
        (home.work / folder.name).mkdir()
        flows.write_json(folder / "flow.json", flows.RunResult(folder.name, "one", status, str(home.path), str(folder), n, {}, (), (os.getpid(), 0.0)))
        return folder.name
    other = Home.open(tmp_path / "other")
    ids = [written(place["home"], n, "done") for n in range(4)]
    theirs = written(other, 9, "done")
    (place["runs"] / "20260101-000008-000-one").mkdir()
    (place["runs"] / "20260101-000008-000-one" / "flow.json").write_text("{}")  # damaged: left alone, and does not stand in the way
    assert flows.prune(place["home"], keep=2, runs=place["runs"]) == ids[1::-1]
    assert sorted(p.name for p in place["runs"].iterdir()) == [*ids[2:], "20260101-000008-000-one", theirs]
    assert [p.name for p in place["home"].work.iterdir()] == ids[3:]  # finished: only the last one's work is of use
    with pytest.raises(FlowError, match="give --home"): flows.resume(theirs, **place)
    with pytest.raises(FlowError, match="no run nothing"): flows.resume("nothing", **place)


@pytest.mark.parametrize(("cell", "message"), [
    ("x = 1", "'x = 1' is not a parameter"), ("x: dict = {}", "a parameter's type is one of"), ("x: Count = 0", "x = 0: must be a whole number from 1"),
    ("x: int", "is not a parameter"), ("print('x')", "is not a parameter")])
def test_a_badly_declared_parameter_is_named(tmp_path, cell, message):
    with pytest.raises(NotebookError, match=message): parameters_of(pipeline(tmp_path / "steps", "bad", parameters=cell))


def test_the_pipelines_of_the_package_declare_what_they_take():
    for steps in flows.FLOWS.values():
        for notebook in flows._notebooks(steps, None):
            declared = parameters_of(notebook)
            assert set(flows.OF_THE_FLOW) <= set(declared) and all(p.help for p in declared.values()), notebook
            source = ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
            assert not any(line.startswith(("def ", "class ")) for s in source for line in s.splitlines()), notebook
            assert "\nfinish(result" in "\n" + source[-1], notebook
