"""`recsys fit` and `recsys recommend`, from a file of histories to a table of answers: what the commands promise, on small files with known answers."""
import json
import os
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from recsys.cli import fit as fit_cli
from recsys.cli import offline
from recsys.models import blend, choice, recipes, release
from recsys.training import protocols
from recsys.training.protocols import FileError

SMALL = {"dim": 16, "heads": 1, "epochs": 2, "dtype": "fp32", "length": 20}
app = typer.Typer()
fit_cli.mount(app)


def circle(n: int, length: int, *, items: int = 30, seed: int = 0) -> list[list[str]]:
    "Everyone goes round the same circle of items, from a place of their own."
    return [[f"i{(start + step) % items}" for step in range(length)] for start in np.random.default_rng(seed).integers(0, items, n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, walks = tmp_path_factory.mktemp("fit"), circle(150, 9)
    (folder / "histories.txt").write_text("".join(f"u{n} {' '.join(walk)}\n" for n, walk in enumerate(walks)))
    (folder / "pairs.txt").write_text("".join(f"u{n} {item}\n" for n, walk in enumerate(walks) for item in walk))
    (folder / "sessions.txt").write_text("".join(f"{' '.join(walk)}\n" for walk in walks))
    (folder / "asked.txt").write_text("i3 i4 i5\n\ni28 i29\nnobody knows this\n")
    return folder


def call(*words: object) -> dict:
    "A command's JSON."
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


# --- files ---

def test_three_ways_to_write_the_same_histories(folder: Path) -> None:
    one, pairs, bare = (protocols.read(folder / f"{name}.txt", p) for name, p in (("histories", "loo"), ("pairs", "loo"), ("sessions", "sessions")))
    assert one.histories == pairs.histories == bare.histories and one.vocab == pairs.vocab == bare.vocab
    assert one.sha256 != pairs.sha256 and one.users.equals(pairs.users)


def test_numbers_do_not_tell_what_came_first(folder: Path) -> None:
    "Ids that follow first appearance give numbers that do not; the seed draws them."
    (folder / "ordered.txt").write_text("".join(f"u{n} {n} {n + 1} {n + 2}\n" for n in range(500)))
    numbers = [protocols.read(folder / "ordered.txt", "loo", seed=s) for s in (0, 1)]
    assert all(abs(np.corrcoef(np.arange(502), c.vocab.encode([str(n) for n in range(502)]))[0, 1]) < 0.2 for c in numbers)
    assert numbers[0].vocab != numbers[1].vocab


@pytest.mark.parametrize(("text", "protocol", "said"), [
    (b"1 2 3\n4 5 6\n1 9 9\n", "loo", "line 3: user '1' has a line already"), (b"\n\n \n", "sessions", "line 1: no items"), (b"a\nb\n", "loo", "no items in the file"),
    (b"a b\nc \xff\n", "loo", "line 2: not UTF-8"), (b"a b\n", "leave", "protocol 'leave'")])
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: bytes, protocol, said: str) -> None:
    (tmp_path / "file.txt").write_bytes(text)
    with pytest.raises(FileError, match=said): protocols.read(tmp_path / "file.txt", protocol)


def test_windows_lines_byte_order_marks_and_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_bytes("﻿u1 a b\r\n\r\nu2 b\tc  a\r\nu3".encode())
    corpus = protocols.read(tmp_path / "file.txt", "loo")
    assert corpus.users.to_list() == ["u1", "u2", "u3"] and [corpus.vocab.decode(h) for h in corpus.histories] == [["a", "b"], ["b", "c", "a"], []]


def test_nothing_that_is_asked_is_known(folder: Path) -> None:
    for name, protocol in (("histories", "loo"), ("sessions", "sessions")):
        corpus = protocols.read(folder / f"{name}.txt", protocol)
        held = protocols.hold_out(corpus, share=0.2)
        rows = dict(held.known.group_by("user_id").agg(pl.col("item_id").sort_by("ts")).iter_rows())
        for user, history, target in zip(held.cases.users, held.cases.histories, held.cases.targets, strict=True):
            if protocol == "sessions": assert user not in rows
            else: assert rows[user] == corpus.vocab.decode(history) and corpus.vocab.decode(target)[0] not in rows[user]
        assert held.known["ts"].max() < held.asof


# --- fitting ---

@pytest.mark.parametrize(("name", "protocol"), [("histories", "loo"), ("pairs", "loo"), ("sessions", "sessions")])
def test_counting_finds_the_circle(folder: Path, tmp_path: Path, name: str, protocol: str) -> None:
    done = call("fit", folder / f"{name}.txt", "--model", "covisit", "--protocol", protocol, "--out", tmp_path / "bundle", "--seed", 3)
    assert done["model"] == "covisit" and done["validation"][f"recall@{20 if protocol == 'sessions' else 10}"]["mean"] > 0.9
    said = call("recommend", "--bundle", tmp_path / "bundle", "--histories", folder / "asked.txt", "--k", 5, "--out", tmp_path / "out.parquet")
    answers = pl.read_parquet(tmp_path / "out.parquet")
    assert answers.columns == ["query", "rank", "item", "score"] and said["rows"] == answers.height == 20
    assert answers.filter(rank=1)["item"][0] == "i6" and answers.filter(rank=1)["item"][2] == "i0"
    for _, rows in answers.group_by("query"):
        assert rows["rank"].to_list() == [1, 2, 3, 4, 5] and rows["score"].is_sorted(descending=True) and rows["item"].n_unique() == 5
    assert not set(answers.filter(query=0)["item"]) & {"i3", "i4", "i5"}


def test_the_best_is_chosen_blended_and_fitted_again(folder: Path, tmp_path: Path) -> None:
    report = offline.fit(folder / "histories.txt", tmp_path / "bundle", model="blend", refit=True, options=SMALL, seed=1)
    assert [t["recipe"]["model"] for t in report["tried"]] == ["covisit", "covisit", "sequential", "blend"] and report["model"] == "blend"
    found = release.load(offline.found(tmp_path / "bundle"))
    model = found.models["blend"]
    assert isinstance(model, blend.Blend) and [p.name for p in model.parts] == ["sequential", "covisit"]
    assert model.asof == 150 * 9 + 1 and found.models["covisit" if "covisit" in found.models else "popular"].counts.sum() == 150 * 9  # on all of the file
    offline.recommend(tmp_path / "bundle", folder / "asked.txt", tmp_path / "out.parquet", k=3)
    assert pl.read_parquet(tmp_path / "out.parquet").filter(rank=1)["item"][0] == "i6"


def test_the_same_seed_gives_the_same_bundle(folder: Path, tmp_path: Path) -> None:
    files = []
    for n, seed in enumerate((0, 0, 1)):
        offline.fit(folder / "histories.txt", tmp_path / str(n), model="sequential", options=SMALL, seed=seed)
        found = release.load(offline.found(tmp_path / str(n)))
        files.append({name: info.sha256 for name, info in found.manifest.files.items()})
    assert files[0] == files[1] and files[0]["vocab.parquet"] != files[2]["vocab.parquet"]


def test_weights_of_a_blend_are_those_of_the_model(folder: Path) -> None:
    "What `weigh` says of a weight is what evaluating the blend says."
    corpus = protocols.read(folder / "histories.txt", "loo")
    held = protocols.hold_out(corpus)
    question = choice.Question(held.known, held.asof, held.cases, held.hide_seen, times=False)
    made = recipes.fit(recipes.Recipe("covisit", recipes.ORDERED), held.known, asof=held.asof, vocab=corpus.vocab, times=False)
    values = choice.weigh([made["popular"]], made["covisit"], question, weights=(0.0, 0.5, 2.0))
    for (weight, _), value in values.items():
        whole = blend.usual([made["popular"]], made["covisit"], weight=weight)
        assert value == pytest.approx(question.judge(whole).intervals["ndcg@10"].mean, abs=2e-3)
    assert values[2.0, 0.0] > values[0.0, 0.0]


def test_a_blend_of_two_networks_is_the_mean_of_their_opinions(folder: Path, tmp_path: Path) -> None:
    corpus = protocols.read(folder / "histories.txt", "loo")
    rows, how = protocols.interactions(corpus), {"asof": len(corpus) + 1, "vocab": corpus.vocab}
    two = blend.fit(rows, **how, members=2, weight=0.5, network=SMALL, counts=recipes.ORDERED, echo=0.1, echoes=recipes.TIMELESS)
    assert [p.name for p in two.parts] == ["sequential", "sequential", "covisit", "popular"] and two.weights == (0.5, 0.5, 0.5, 0.1)
    asked = corpus.histories[:5]
    logs = [blend.shares(p.scores(asked), f) for p, f in zip(two.parts, two.floors, strict=True)]
    expected = (logs[0] + logs[1]) / 2 + 0.5 * logs[2] + np.float32(0.1) * logs[3]
    assert np.allclose(np.log(two.scores(asked)[:, 1:]), (expected - expected[:, 1:].max(1, keepdims=True) - np.log(np.exp(expected - expected[:, 1:].max(1, keepdims=True))[:, 1:].sum(1, keepdims=True)))[:, 1:], atol=1e-4)
    assert not np.array_equal(logs[0], logs[1])  # of different seeds
    two.save(tmp_path / "two")
    assert (blend.load(tmp_path / "two", corpus.vocab).scores(asked) == two.scores(asked)).all()


def test_another_network_is_trained_only_where_its_time_is_left(folder: Path) -> None:
    corpus = protocols.read(folder / "histories.txt", "loo")
    held = protocols.hold_out(corpus)
    question = choice.Question(held.known, held.asof, held.cases, held.hide_seen, times=False)
    def judging(minutes: float | None, took: float, each: float = 0.0) -> choice._Judging:
        return choice._Judging(question, None, None, choice.Budget(minutes), each=each, took=took)
    assert judging(60, took=600).another(1)
    assert not judging(None, took=1).another(1) and not judging(60, took=3600).another(1) and not judging(60, took=600, each=3000 / len(question.cases)).another(1)


def test_a_time_budget_reaches_the_network_without_what_came_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The minutes that a network gets are those that are left, less what judging takes."
    given: list[tuple[float, float]] = []  # minutes given, minutes left

    @wraps(recipes.sequential.fit)
    def fit(*args, minutes: float, **how):
        given.append((minutes, (until - time.monotonic()) / 60))
        return real(*args, **{**how, **SMALL})
    real = recipes.sequential.fit
    monkeypatch.setattr(recipes.sequential, "fit", fit)
    corpus = protocols.read(folder / "histories.txt", "loo")
    for refit, share in ((False, 1.0), (True, 0.5)):
        given.clear()
        until = time.monotonic() + 60
        offline.choose(corpus, "sequential", until=until, refit=refit)
        first, left = given[0]
        assert share - (1 - left) - 0.1 < first <= share and len(given) == 1 + refit
        if refit: assert given[1][1] <= given[1][0] <= left  # all that the first left


# --- answering ---

def test_a_batch_of_any_size_gives_the_same_answers(folder: Path, tmp_path: Path) -> None:
    offline.fit(folder / "histories.txt", tmp_path / "bundle", model="covisit")
    (tmp_path / "many.txt").write_text("".join(f"{' '.join(walk)}\n" for walk in circle(230, 4, seed=5)))
    made = []
    for batch in (1, 7, 1000):
        offline.recommend(tmp_path / "bundle", tmp_path / "many.txt", tmp_path / "out.parquet", k=4, batch=batch)
        made.append(pl.read_parquet(tmp_path / "out.parquet"))
    assert made[0].equals(made[1]) and made[1].equals(made[2]) and made[0]["query"].n_unique() == 230


def test_more_answers_than_items_and_seen_ones_when_asked(folder: Path, tmp_path: Path) -> None:
    offline.fit(folder / "histories.txt", tmp_path / "bundle", model="popular")
    for keep, expected in ((False, [27, 30, 28, 30]), (True, [30, 30, 30, 30])):
        offline.recommend(tmp_path / "bundle", folder / "asked.txt", tmp_path / "out.parquet", k=99, keep_seen=keep)
        assert pl.read_parquet(tmp_path / "out.parquet").group_by("query", maintain_order=True).len()["len"].to_list() == expected


def test_a_failed_answer_leaves_no_table(folder: Path, tmp_path: Path) -> None:
    offline.fit(folder / "histories.txt", tmp_path / "bundle", model="popular")
    (tmp_path / "bad.txt").write_bytes(b"i1 i2\n" * 1500 + b"\xff\n")
    with pytest.raises(FileError, match="line 1501"): offline.recommend(tmp_path / "bundle", tmp_path / "bad.txt", tmp_path / "out.parquet")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


@pytest.mark.parametrize(("words", "said"), [(("fit", "{}/histories.txt", "--out", "{}"), "holds other files"), (("recommend", "--bundle", "{}", "--histories", "{}/asked.txt", "--out", "x"), "no bundle there")])
def test_refusals_are_one_line_and_exit_code_1(folder: Path, words: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(app, [w.format(folder) for w in words])
    assert done.exit_code == 1 and said in done.stderr and done.stderr.count("\n") == 1


def test_answering_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    offline.fit(folder / "histories.txt", tmp_path / "bundle", model="blend", options=SMALL)
    code = ("import sys; from recsys.models import release; from recsys.prep.sequences import Sequences\n"
            f"m = release.load({str(offline.found(tmp_path / 'bundle'))!r}).models['blend']\n"
            "print(m.recommend(Sequences.from_lists([[1, 2], []]), k=3).items.tolist()[1], 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    assert done.stdout.strip() == "[0, 0, 0] False"
