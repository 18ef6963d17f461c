"""The benchmark of serving against a gateway that runs: what it counts is what happened, on a shop that is small enough for a test."""
from __future__ import annotations

from pathlib import Path

import pytest

from recsys.bench import serving
from recsys.bench.clicks import clicked
from recsys.bench.harness import BenchError
from recsys.bench.serving_shop import open_shop, ours
from recsys.settings import Home, root

PEERS = root() / "benchmarks" / "peers"
SMALL = serving.Sizes(items=300, users=40, seconds=1.0, repeats=1, connections=2, rate=20, full_rate=20, clicks=20, overload=2, batch=5, workers=1)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("shop")
    told = folder / "histories.txt"
    told.write_text("".join(f"u{u:07d} {' '.join(f'i{(u * 7 + n) % 300:06d}' for n in range(20))}\n" for u in range(SMALL.users)))
    return open_shop(Home.open(folder / "home"), PEERS, told, items=SMALL.items, seed=1)


def test_both_tiers_are_right_and_counted(shop, tmp_path: Path) -> None:
    "Answers of the full tier are made with features, explored and exact where nothing is explored; events and clicks arrive."
    full, script = serving.with_features(shop, tmp_path / "full", seed=1), PEERS / "load.py"
    with ours("retrieval", shop) as quick:
        assert serving.recall(quick, shop, queries=20) == 1.0
        found = serving.loaded(quick, script, SMALL, mine=True)
        assert found["requests"] > 0 and not found["errors"] and found["cpu_us"] > 0
        batches = serving.loaded(quick, script, SMALL, mine=True, path="/v1/events", template=serving.batch_template(SMALL.batch))
        assert set(batches["statuses"]) == {"202"}
        seen = clicked(quick, list(shop.histories)[:10], per_second=20, seconds=1, connections=4)
        assert seen["clicks"] == 20 and seen["late"] == 0
        with pytest.raises(BenchError, match="load.py"): serving.loaded(quick, script, SMALL, mine=True, seconds=1e6)
    with ours("full", full, **serving.EXPLORE) as explored:
        answers = [slot for _ in range(5) for slot in _asked(explored)]
    assert {s["propensity"] for s in answers} != {1.0} and all(0 < s["propensity"] <= 1 for s in answers)


def _asked(server) -> list[dict]:
    import httpx
    found = httpx.post(f"http://127.0.0.1:{server.port}/v1/recommendations", json={"user_id": "u0000001", "k": 5}, headers={"Authorization": f"Bearer {server.key}"}).json()
    assert found["tier"] == "retrieval", found
    return found["items"]


@pytest.mark.long
def test_the_whole_run(tmp_path: Path) -> None:
    report = serving.serving(root(), tmp_path / "work", sizes=SMALL)
    kept = serving.keep(report, tmp_path / "results")
    assert list(kept)[:4] == ["rps", "p99_ms", "cpu_us", "recall"] and kept["recall"] == 1.0
    assert set(kept["rps"]) == {"retrieval", "full", "fastapi_torch", "fastapi_onnx_faiss"} and len(kept["rows"]) == len(serving.RULES)
    assert all(Path(file).stat().st_size for file in kept["files"])
