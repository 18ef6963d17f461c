"""One query through encoder and index is what all items compared give: on a catalogue that is large enough for codes, with filters, and in a bundle."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from recsys.bench.serving_shop import network
from recsys.models import blend, popular, release, transformer
from recsys.models.blend import Blend
from recsys.models.bundle import promote
from recsys.models.covisit import Covisit, Neighbours
from recsys.models.index import FEW, LEAST
from recsys.models.manifest import BundleError
from recsys.models.transformer import Transformer
from recsys.prep.sequences import Sequences
from recsys.prep.vocab import Vocab
from recsys.schema import ITEMS
from recsys.serving.engine import Engine
from recsys.serving.wire import RecommendationRequest

N, DIM, K = FEW + 2000, 16, 20
VOCAB = Vocab(pl.Series([f"i{n:05}" for n in range(N)]))


def histories(n: int, *, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(1, N + 1, (n, 30)).astype(np.int32))


@pytest.fixture(scope="module")
def net() -> Transformer:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((N // 100, DIM), dtype=np.float32)
    vectors = centres[rng.integers(0, len(centres), N)] + 0.8 * rng.standard_normal((N, DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    counts = np.append(0, rng.integers(1, 1000, N))
    model = Transformer(VOCAB, network(vectors, length=40, seed=0), counts, np.empty((0, DIM), np.float32), repeats=False, asof=0)
    return replace(model, asked=model.states(Sequences.from_lists(histories(64, seed=1))))


@pytest.fixture(scope="module")
def counts() -> Covisit:
    "Thirty neighbours for each item."
    rng, n = np.random.default_rng(2), N + 1
    near, weight = rng.integers(1, n, (n, 30)), rng.random((n, 30), dtype=np.float32)
    table = sparse.csr_matrix((weight[1:].ravel(), (np.repeat(np.arange(1, n), 30), near[1:].ravel())), shape=(n, n), dtype=np.float32)
    table.sum_duplicates()
    return Covisit(VOCAB, Neighbours(table, 10, 0.7), np.append(0, np.full(N, 7)))


def whole(net: Transformer, counts: Covisit) -> Blend:
    "All kinds of parts: two networks, counts, and what was heard."
    other = replace(net, forward=network(net.forward.weights["table"][1:], length=40, seed=7))
    heard = popular.Popular(VOCAB, np.append(0, np.arange(N, 0, -1)).astype(np.float32), np.append(0, np.ones(N, np.int64)), 0, echo=0.1)
    return blend.usual([net, other], counts, weight=0.5, heard=heard, echo=0.2)


@pytest.fixture(scope="module")
def bundle(net: Transformer, counts: Covisit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A release with the blend, and popular as its floor."
    shop = pl.DataFrame({"item_id": VOCAB.ids, "title": VOCAB.ids, "in_stock": np.random.default_rng(3).random(N) < 0.9})
    shop = shop.with_columns(pl.lit(None, dtype=t).alias(c) for c, t in ITEMS.items() if c not in shop.columns).select(list(ITEMS)).cast(dict(ITEMS))  # type: ignore[arg-type]
    floor = popular.Popular(VOCAB, np.append(0, np.ones(N)).astype(np.float32), np.append(0, np.ones(N, np.int64)), 0)
    about = {"created": 1, "data": {"asof": 1}, "metrics": {}, "settings": {}}
    return release.write_bundle([whole(net, counts), floor], shop, registry=tmp_path_factory.mktemp("registry"), about=about)


def same(a: np.ndarray, b: np.ndarray) -> float: return len(np.intersect1d(a[a > 0], b[b > 0])) / max(np.count_nonzero(b), 1)


def asked(n: int) -> list[tuple[Sequences, Sequences, np.ndarray]]:
    "A history, what it hides, and what may be shown."
    allowed = np.random.default_rng(4).random(N + 1) < 0.9
    return [(Sequences.from_lists([h]), Sequences.from_lists([np.unique(h)]), allowed) for h in histories(n, seed=5)]


def test_the_bundle_says_what_its_index_is_worth(bundle: Path) -> None:
    quick = release.load(bundle).models["blend"].parts[0]  # type: ignore[attr-defined]
    assert isinstance(quick, Transformer) and quick.index is not None
    report = quick.index.report
    assert report.kind in ("lists", "codes") and report.recall >= LEAST and report.items == N and report.bytes < N * DIM * 4


@pytest.mark.parametrize("filtered", [False, True])
def test_one_query_is_the_full_comparison(bundle: Path, net: Transformer, counts: Covisit, filtered: bool) -> None:
    "Items of sequential and of the blend, alone through the index and in a batch of two over all items."
    loaded, found = release.load(bundle).models["blend"], []
    assert isinstance(loaded, Blend)
    for full, quick in ((net, loaded.parts[0]), (whole(net, counts), loaded)):
        shares = []
        for one, hide, allowed in asked(20):
            twice = [Sequences.from_lists([rows[0], rows[0]]) for rows in (one, hide)]
            how = {"filters": allowed} if filtered else {}
            slate = quick.recommend(one, k=K, exclude=hide, **how)
            shares.append(same(slate.items[0], full.recommend(twice[0], k=K, exclude=twice[1], **how).items[0]))
            assert (slate.items[0] > 0).all() and (np.diff(slate.scores[0]) <= 0).all() and (slate.scores[0] > 0).all()
            assert not np.isin(slate.items[0], hide[0]).any() and (not filtered or allowed[slate.items[0]].all())
        found.append(float(np.mean(shares)))
    assert min(found) >= LEAST, found


def test_odd_queries_are_answered(bundle: Path) -> None:
    loaded, one = release.load(bundle).models["blend"], Sequences.from_lists([histories(1, seed=6)[0]])
    few, none = np.zeros(N + 1, bool), np.zeros(N + 1, bool)
    few[[5, 77]] = True
    assert sorted(loaded.recommend(one, k=K, filters=few).items[0].tolist())[-2:] == [5, 77]
    assert not loaded.recommend(one, k=K, filters=none).items.any()
    all_but = np.setdiff1d(np.arange(1, N + 1), [9, 10, 11]).astype(np.int32)
    assert sorted(loaded.recommend(one, k=3, exclude=Sequences.from_lists([all_but])).items[0].tolist()) == [9, 10, 11]
    assert loaded.recommend(Sequences.from_lists([[0, 0]]), k=3).items.tolist() == [[1, 2, 3]]  # nothing is known: what all have heard
    assert np.count_nonzero(loaded.recommend(one, k=N + 100).items) == N


def test_an_engine_answers_through_it(bundle: Path) -> None:
    engine = Engine.load(bundle)
    slate = engine.recommend(RecommendationRequest(items=["i00003", "i00500"], k=K), None, now=2)
    assert len(slate.slots) == K and {s.source for s in slate.slots} == {"blend"}


def test_a_broken_encoder_or_index_is_refused(bundle: Path, tmp_path: Path) -> None:
    "Hashes are right, as the bundle was made of broken files."
    import shutil
    for name in ("encoder.onnx", "index.faiss"):
        there = release.load(bundle)
        copy = tmp_path / name
        shutil.copytree(bundle, copy)
        file = next(copy.rglob(name))
        file.write_bytes(file.read_bytes()[:500])
        with pytest.raises(ValueError, match=name): transformer.load(file.parent, there.vocab)
        with pytest.raises(BundleError): promote(copy.parent, bundle.name, reason="test")


def test_answering_needs_neither_torch_nor_onnx(bundle: Path) -> None:
    "The process that answers has ONNX Runtime and faiss only."
    code = f"""
import sys
from recsys.serving.engine import Engine
from recsys.serving.wire import RecommendationRequest
engine = Engine.load({str(bundle)!r})
assert engine.recommend(RecommendationRequest(items=["i00003"], k=5), None, now=2).slots
print([m for m in ("torch", "onnx", "mlflow", "deltalake") if m in sys.modules], "onnxruntime" in sys.modules, "faiss" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] True True"
