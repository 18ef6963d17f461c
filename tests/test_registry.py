"""The registry when its mirror is away, and what a run of the quality bench leaves behind."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys.bench import quality
from recsys.bench.harness import BenchError, Run
from recsys.models import bundle, registry
from recsys.models.manifest import BundleError, write
from recsys.training.evaluate import SLICES, Evaluation
from recsys.training.metrics import Interval


def written(home: Path, n: int) -> str:
    return write(home, {"weights.json": lambda p: p.write_text(str(n))}, about={"created": n}).name


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    "MLflow's database cannot be reached."
    def gone(name: str) -> None: raise ConnectionError("the database is away")
    monkeypatch.setattr(registry, "import_module", gone)


def test_a_promotion_without_the_mirror_changes_nothing(tmp_path: Path, away: None):
    first, second = written(tmp_path, 1), written(tmp_path, 2)
    bundle.promote(tmp_path, first, reason="first", at=1)
    with pytest.raises(ConnectionError): registry.promote(tmp_path, second, reason="better", at=2)
    now = bundle.current(tmp_path)
    assert now is not None and now.bundle == first


def test_a_rollback_does_not_wait_for_the_mirror(tmp_path: Path, away: None):
    first, second = written(tmp_path, 1), written(tmp_path, 2)
    for n, name in enumerate((first, second)): bundle.promote(tmp_path, name, reason="by hand", at=n)
    registry.folder(tmp_path).mkdir()
    (registry.folder(tmp_path) / "mlflow.db").touch()  # something was tracked once
    assert registry.rollback(tmp_path, at=3).bundle == first


def test_nothing_tracked_is_no_disagreement_and_imports_nothing(tmp_path: Path, away: None):
    bundle.promote(tmp_path, written(tmp_path, 1), reason="first", at=1)
    assert registry.disagreement(tmp_path) is None
    with pytest.raises(BundleError): registry.promote(tmp_path, "0" * 32, reason="no such bundle")


def test_a_run_is_kept_and_becomes_a_line(tmp_path: Path):
    task = quality.TASKS["beauty"]
    means = {"hit@10": .104, "ndcg@10": .0625}
    found = Evaluation("blend", {m: np.array([v]) for m, v in means.items()}, {m: Interval(v, v - .002, v + .002) for m, v in means.items()},
                       pl.DataFrame(schema=SLICES), .5, 9., 1, 0, 2., "k", np.array([0]))
    for seed in (0, 1): quality.keep(quality.record(task, Run("x", 0, 500., 480., 1., 3., {"recipe": {"model": "blend"}}), found, seed=seed, minutes=9.5, model="best", threads=2), tmp_path)
    kept = quality.kept(tmp_path)
    assert len(kept) == 2 and json.dumps(kept) and len(kept[0]["code"]) == 16
    row = next(r for r in quality.lines(kept) if r["task"] == "beauty")
    assert row["reached"] == "must" and row["seeds"] == "0 1" and row["CPU min"] == "8.3" and row["ndcg@10"].startswith("0.0625 [0.0605")
    with pytest.raises(BenchError, match="not there; say where"): quality.training_file(task, tmp_path, tmp_path)
    with pytest.raises(BenchError, match="must be one of"): quality.quality(["netflix"], root=tmp_path, work=tmp_path, results=tmp_path)
