"""Metrics, cases and gates against the plainest program that could be right."""
from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from recsys.prep.clean import NoTimes, interactions
from recsys.prep.sequences import Sequences
from recsys.prep.vocab import Vocab
from recsys.schema import ITEM_ID, TS, TS_IS_ORDER, TYPE, USER_ID
from recsys.synth import T0, checkerboard, shop
from recsys.training.evaluate import LENGTHS, Evaluation, evaluate, slices, table
from recsys.training.gates import decide
from recsys.training.metrics import (
    bootstrap,
    bootstraps,
    coverage,
    debiased_ndcg,
    hit,
    mrr,
    ndcg,
    novelty,
    paired_bootstrap,
    ranks,
    rarity,
    recall,
    top,
)
from recsys.training.splits import (
    Cases,
    LeakError,
    Split,
    assert_before,
    assert_no_leak,
    before_last,
    cases,
    hold_out_users,
    leave_one_out,
    popularity,
    prefix_cases,
    time_split,
)

many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
value = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 0.5, 2.0])


@st.composite
def scored(draw, widest: int = 12):
    "Scores with many ties, targets (0 included) and hidden items."
    q, v = draw(st.integers(1, 4)), draw(st.integers(2, widest))
    scores = np.array(draw(st.lists(st.lists(value, min_size=v, max_size=v), min_size=q, max_size=q)), np.float32)
    item = st.integers(0, v - 1)
    targets = draw(st.lists(st.lists(item, min_size=1, max_size=9), min_size=q, max_size=q))
    hidden = draw(st.lists(st.lists(item.filter(bool), max_size=3) if v > 1 else st.just([]), min_size=q, max_size=q))
    return scores, targets, hidden


def plain_ranks(row, wanted, hidden) -> list[float]:
    left = {i: s for i, s in enumerate(row.tolist()) if i and i not in hidden}
    def rank(i):
        if left.get(i, -math.inf) == -math.inf: return math.inf
        return 1 + sum(s > left[i] for s in left.values()) + (sum(s == left[i] for s in left.values()) - 1) / 2
    return [rank(i) for i in wanted]


@many
@given(scored(), st.integers(1, 5))
def test_ranks_and_metrics_equal_brute_force(world, k: int):
    scores, targets, hidden = world
    before = scores.copy()
    found = ranks(scores, Sequences.from_lists(targets), hidden=Sequences.from_lists(hidden))
    want = [plain_ranks(*three) for three in zip(scores, targets, hidden, strict=True)]
    assert found.values.tolist() == [r for row in want for r in row] and (scores == before).all()
    for q, row in enumerate(want):
        inside = [r for r in row if r <= k]
        ideal = sum(1 / math.log2(i + 1) for i in range(1, min(k, len(row)) + 1))
        assert recall(found, k=k)[q] == pytest.approx(len(inside) / len(row))
        assert hit(found, k=k)[q] == bool(inside)
        assert mrr(found, k=k)[q] == pytest.approx(1 / min(inside) if inside else 0)
        assert ndcg(found, k=k)[q] == pytest.approx(min(1, sum(1 / math.log2(r + 1) for r in inside) / ideal))


@many
@given(scored(), st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0]), st.lists(st.integers(0, 50), min_size=12, max_size=12))
def test_debiased_ndcg_equals_brute_force(world, k: int, power: float, counts: list):
    scores, targets, _ = world
    popular = np.array([0, *counts[1:]])
    rows = Sequences.from_lists(targets)
    found, weights = ranks(scores, rows), rarity(rows.values, popularity=popular, power=power)
    got = debiased_ndcg(found, k=k, weights=weights)
    want, total = [], []
    for row, wanted in zip(scores, targets, strict=True):
        heavy = [(popular[i] + 1.0) ** -power for i in wanted]
        gain = sum(w / math.log2(r + 1) for w, r in zip(heavy, plain_ranks(row, wanted, []), strict=True) if r <= k)
        want.append(min(1, gain / sum(w / math.log2(n + 2) for n, w in enumerate(sorted(heavy, reverse=True)[:k]))))
        total.append(sum(heavy) / len(heavy))
    assert got.mean() == pytest.approx(sum(a * b for a, b in zip(want, total, strict=True)) / sum(total))
    if power == 0: assert got == pytest.approx(ndcg(found, k=k))


def test_metrics_that_share_draws_have_the_intervals_they_have_alone():
    rng = np.random.default_rng(1)
    values, groups = {name: rng.random(60) for name in "ab"}, rng.integers(0, 9, 60)
    together = bootstraps(values, seed=3, groups=groups, rounds=50, together=7)
    for name, v in values.items():
        alone = bootstrap(v, seed=3, groups=groups, rounds=50)
        assert (together[name].mean, together[name].low, together[name].high) == pytest.approx((alone.mean, alone.low, alone.high))
    with pytest.raises(ValueError, match="power"): rarity(np.array([1]), popularity=np.array([0, 1]), power=2)


@many
@given(scored(widest=9), st.integers(1, 12), st.lists(st.integers(0, 3), min_size=9, max_size=9))
def test_lists_are_by_score_then_popularity_then_number(world, k: int, counts: list):
    scores, _, hidden = world
    favour = np.array(counts)[:scores.shape[1]]
    found = top(scores, k=k, popularity=favour, hidden=Sequences.from_lists(hidden))
    for row, hide, got in zip(scores, hidden, found, strict=True):
        left = [i for i in range(1, len(row)) if i not in hide and row[i] > -np.inf]
        assert [i for i in got.tolist() if i] == sorted(left, key=lambda i: (-row[i], -favour[i], i))[:k]


@pytest.mark.parametrize("k", [1, 7, 40, 400])
def test_lists_of_a_wide_row(k: int):
    rng = np.random.default_rng(k)
    scores = rng.integers(0, 30, (5, 5000)).astype(np.float32)  # ties on every boundary
    scores[1, 100:] = -np.inf
    for row, got in zip(scores, top(scores, k=k), strict=True):
        want = 1 + np.argsort(-row[1:], kind="stable")[:k]
        assert got.tolist() == np.where(row[want] > -np.inf, want, 0).tolist()


def test_many_targets_and_few_give_the_same_ranks():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 50, (3, 300)).astype(np.float32)
    targets = [rng.choice(np.arange(1, 300), 40, replace=False) for _ in range(3)]
    together = ranks(scores, Sequences.from_lists(targets)).values.reshape(3, 40)
    for q in range(3):
        alone = ranks(np.repeat(scores[q:q + 1], 40, axis=0), Sequences.from_lists(targets[q][:, None])).values
        assert (alone == together[q]).all()


def test_what_has_no_answer_is_refused():
    one = Sequences.from_lists([[1]])
    with pytest.raises(ValueError, match="NaN"): ranks(np.array([[0, np.nan]]), one)
    with pytest.raises(ValueError, match="2 rows of scores for 1 cases"): ranks(np.zeros((2, 3)), one)
    with pytest.raises(ValueError, match="case 1 has no target"): ranks(np.zeros((2, 3)), Sequences.from_lists([[1], []]))
    with pytest.raises(ValueError, match="no cases"): bootstrap(np.empty(0), seed=0)
    with pytest.raises(ValueError, match="cannot be paired"): paired_bootstrap(np.zeros(2), np.zeros(3), seed=0)
    with pytest.raises(ValueError, match="confidence"): bootstrap(np.zeros(2), seed=0, confidence=95)
    assert len(ranks(np.zeros((0, 3)), Sequences.from_lists([]))) == 0


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    inside = [(i := bootstrap(rng.random(150) < .2, seed=n, rounds=200)).low <= .2 <= i.high for n in range(200)]
    assert .90 <= np.mean(inside) <= .98
    clustered = []
    for n in range(100):
        of = np.repeat(np.arange(60), 5)
        interval = bootstrap((rng.random(60) < .3).astype(float)[of], seed=n, rounds=200, groups=of)
        clustered.append(interval.low <= .3 <= interval.high)
    assert .86 <= np.mean(clustered) <= .99
    flat = bootstrap(np.full(9, .5), seed=0)
    assert (flat.mean, flat.low, flat.high) == (.5, .5, .5)
    assert bootstrap(np.array([0., 1, 1]), seed=4) == bootstrap(np.array([0., 1, 1]), seed=4)


def test_coverage_and_novelty_known_answers():
    assert coverage(np.array([[1, 2], [2, 0]]), size=4) == .5
    bits = novelty(np.array([[1, 2], [0, 0], [3, 0]]), popularity=np.array([0, 3, 0, 1]))  # shares 4/7, 1/7, 2/7
    assert bits[0] == pytest.approx((math.log2(7 / 4) + math.log2(7)) / 2) and math.isnan(bits[1]) and bits[2] == pytest.approx(math.log2(3.5))


GAP = 30 * 60_000
rows = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("mnopq"), st.sampled_from(["view", "purchase"]),
                          st.sampled_from([0, 1, GAP, GAP + 1, 2 * GAP, 3 * GAP, 4 * GAP, 4 * GAP + 2, 9 * GAP])), max_size=25).map(
    lambda r: pl.DataFrame([(u, i, t, T0 + ts) for u, i, t, ts in r], schema={USER_ID: pl.String, ITEM_ID: pl.String, TYPE: pl.String, TS: pl.Int64}, orient="row")
    .sort(USER_ID, TS, maintain_order=True))


def plain_cases(frame: pl.DataFrame, start: int, end: int, target: str, types, history: int, cold: bool) -> list:
    out = []
    for user in sorted(set(frame[USER_ID])):
        mine = [r for r in frame.rows() if r[0] == user and r[3] < end]
        steps: list[list] = []
        for n, r in enumerate(mine):
            before = mine[n - 1][3] if n else None
            new = n == 0 or (before < start <= r[3]) or (target == "next" and r[3] > before) or (target == "basket" and r[3] - before > GAP)
            if new: steps.append([])
            steps[-1].append(n)
        for step in steps:
            past = [r[1] for r in mine[max(0, step[0] - history):step[0]]]
            wanted = list(dict.fromkeys(mine[n][1] for n in step if mine[n][2] in types))
            if mine[step[0]][3] >= start and wanted and (cold or step[0] > 0): out.append((user, past, wanted, [w in past for w in wanted]))
    return out


@many
@given(rows, st.sampled_from(["next", "basket", "window"]), st.sampled_from([("view", "purchase"), ("purchase",)]), st.integers(1, 6), st.booleans(),
       st.sampled_from([0, 1, GAP, 4 * GAP]), st.sampled_from([1, 2 * GAP]))
def test_cases_equal_plain_python(frame, target, types, history, cold, start, width):
    split = Split(T0 + start, T0 + start + width, T0 + 10 * GAP)
    for part in ("validation", "test"):
        vocab = Vocab.build(split.before(frame, part))
        got = cases(frame, split, part, vocab, target=target, types=types, history=history, cold=cold)
        want = plain_cases(frame, *split.window(part), target, types, history, cold)
        known = set(vocab.ids)
        assert got.users.to_list() == [u for u, *_ in want]
        assert [vocab.decode(h) for h in got.histories] == [[i for i in p if i in known] for _, p, *_ in want]
        assert [vocab.decode(t) for t in got.targets] == [[i if i in known else None for i in w] for _, _, w, _ in want]
        assert got.seen.tolist() == [s for *_, seen in want for s in seen] and got.asof == split.window(part)[0]
        past = split.before(frame, part).collect()[ITEM_ID].to_list()
        assert got.popularity.tolist() == [0, *(past.count(i) for i in vocab.ids)]
        left = got.unseen()
        assert not left.seen.any() and left.users.to_list() == [u for u, _, _, seen in want if not all(seen)]
        assert left.targets.lengths.tolist() == [seen.count(False) for *_, seen in want if not all(seen)]


@many
@given(rows)
def test_leave_one_out_equals_plain_python(frame):
    vocab = Vocab.build(frame, seed=1)
    by_user = {u: frame.filter(pl.col(USER_ID) == u)[ITEM_ID].to_list() for u in sorted(set(frame[USER_ID]))}
    for part, back in (("test", 1), ("validation", 2)):
        got = leave_one_out(frame, part, vocab)
        want = {u: i for u, i in by_user.items() if len(i) >= 3}
        assert got.users.to_list() == list(want) and got.asof is None
        assert [vocab.decode(t) for t in got.targets] == [[i[-back]] for i in want.values()]
        assert [vocab.decode(h) for h in got.histories] == [i[:-back] for i in want.values()]
        kept = before_last(frame, part)
        assert {u: kept.filter(pl.col(USER_ID) == u)[ITEM_ID].to_list() for u in by_user} == {u: i[:-back] if len(i) >= 3 else i for u, i in by_user.items()}


@many
@given(rows, st.integers(0, 5))
def test_prefixes_and_drawing(frame, most: int):
    assume(frame.height)
    vocab = Vocab.build(frame)
    frame = frame.unique([USER_ID, TS], keep="first", maintain_order=True)
    got = prefix_cases(frame, vocab, training=frame)
    want = [(h[:n], h[n]) for u in sorted(set(frame[USER_ID])) for h in [frame.filter(pl.col(USER_ID) == u)[ITEM_ID].to_list()] for n in range(1, len(h))]
    assert [(vocab.decode(h), vocab.decode(t)[0]) for h, t in zip(got.histories, got.targets, strict=True)] == want
    few = prefix_cases(frame, vocab, training=frame, most=most, seed=3)
    assert len(few) == min(most, len(want)) and few.key == prefix_cases(frame, vocab, training=frame, most=most, seed=3).key


def test_splits_refuse_what_they_cannot_part():
    order = pl.DataFrame({USER_ID: "a", ITEM_ID: "m", TYPE: "view", TS: [1, 2, 3], TS_IS_ORDER: True})
    with pytest.raises(NoTimes, match="leave_one_out"): time_split(order)
    with pytest.raises(NoTimes, match="leave_one_out"): time_split(order.drop(TS_IS_ORDER))
    with pytest.raises(ValueError, match="too short"): time_split(pl.DataFrame({TS: [T0, T0]}))
    with pytest.raises(ValueError, match="too short"): time_split(pl.DataFrame({TS: []}, schema={TS: pl.Int64}))
    with pytest.raises(ValueError, match="holdout = 0.5"): time_split(shop().events, holdout=.5)
    with pytest.raises(ValueError, match="validation or test"): Split(1, 2, 3).window("train")  # type: ignore[arg-type]
    assert_before(shop().events, int(shop().events[TS].max()) + 1)
    with pytest.raises(LeakError, match="1 rows"): assert_before(shop().events, int(shop().events[TS].max()))
    parts = hold_out_users(pl.Series([f"u{n}" for n in range(100)] * 2), holdout=.1, seed=5)
    assert dict(parts["part"].value_counts().iter_rows()) == {"train": 80, "validation": 10, "test": 10}


BOARD = interactions(checkerboard(users=120).lazy()).collect()
SPLIT = time_split(BOARD, holdout=.2)
TRAIN = SPLIT.before(BOARD, "test").collect()


class Count:
    name = "count"

    def __init__(self, vocab: Vocab, row: np.ndarray | None = None):
        self.vocab, self.sizes = vocab, []
        self.row = popularity(TRAIN, vocab).astype(np.float32) if row is None else row

    def scores(self, histories: Sequences) -> np.ndarray:
        self.sizes.append(len(histories))
        return np.tile(self.row, (len(histories), 1))


def asked(**options) -> Cases: return cases(BOARD, SPLIT, "test", Vocab.build(TRAIN), target="next", **options)


def test_evaluation_equals_brute_force_and_holds_few_scores_at_a_time():
    held = asked()
    model = Count(held.vocab)
    found = evaluate(model, held, k=(5, 10), seed=0, cells=7 * len(held.vocab))
    assert max(model.sizes) == 7 and sum(model.sizes) == len(held) == found.n and found.left_out == 0
    want = [plain_ranks(model.row, t.tolist(), set(h.tolist())) for h, t in zip(held.histories, held.targets, strict=True)]
    assert found.per_case["hit@5"].tolist() == [float(min(r) <= 5) for r in want]
    assert found.intervals["mrr@10"].mean == pytest.approx(np.mean([1 / min(r) if min(r) <= 10 else 0 for r in want]))
    assert set(found.per_case) == {f"{m}@{k}" for m in ("recall", "ndcg", "mrr", "hit", "debiased_ndcg") for k in (5, 10)} and 0 < found.coverage <= 1
    assert table([found]).height == 12 and all(t.shape == (len(held),) for t in slices(held).values())
    assert (sum(slices(held)[name] for name in LENGTHS) == 1).all()  # each case has one length


def test_hiding_is_a_policy():
    learnt = interactions(shop().events.lazy()).collect()
    split = time_split(learnt, holdout=.3)
    vocab = Vocab.build(split.before(learnt, "test"))
    held = cases(learnt, split, "test", vocab)  # bob, who had met the mug, and gus
    row = popularity(split.before(learnt, "test"), vocab).astype(np.float32)
    shown, hidden = (evaluate(Count(vocab, row), held, k=10, seed=0, hide_seen=h) for h in (False, True))
    assert (shown.n, shown.left_out, hidden.n, hidden.left_out) == (2, 0, 1, 1) and shown.key != hidden.key
    assert shown.per_case["recall@10"].tolist() == [1, 1]


def test_a_model_of_another_vocabulary_is_asked_the_same_cases():
    held = asked()
    few = Vocab(held.vocab.ids[:10])
    whole, part = evaluate(Count(held.vocab), held, seed=0), evaluate(Count(few), held, seed=0)
    assert whole.key == part.key and whole.n == part.n
    unknown = held.targets.values > 10
    assert (part.per_case["hit@10"][unknown] == 0).all() and part.per_case["hit@10"][~unknown].mean() > whole.per_case["hit@10"][~unknown].mean()


def test_no_cases_wrong_shapes_and_leaks(tmp_path):
    none = evaluate(Count(asked().vocab), asked().take(np.array([], np.int64)), seed=0)
    assert none.n == 0 and math.isnan(none.intervals["ndcg@10"].mean)
    none.write(tmp_path)
    assert "NaN" not in (tmp_path / "evaluation.json").read_text() and Evaluation.read(tmp_path).n == 0
    assert not decide(none, champion=None, baseline=none, seed=0).promote
    with pytest.raises(ValueError, match="a row a history"): evaluate(Count(asked().vocab, np.zeros(3, np.float32)), asked(), seed=0)
    late = Count(asked().vocab)
    late.asof = SPLIT.until  # type: ignore[attr-defined]
    with pytest.raises(LeakError, match="after asof"): evaluate(late, asked(), seed=0)


def test_the_platforms_models_read_nothing_past_the_split():
    from recsys.models import covisit, popular
    for module in (popular, covisit):
        assert_no_leak(lambda rows, module=module: module.fit(rows, asof=SPLIT.test_from, seed=0), BOARD, asof=SPLIT.test_from)


def test_a_model_fitted_past_the_cases_is_refused_by_evaluation_itself():
    from recsys.models import recipes
    fitted = {at: recipes.whole(recipes.fit(recipes.Recipe("covisit"), BOARD, asof=at)) for at in (SPLIT.test_from, SPLIT.test_from + 1)}
    assert evaluate(fitted[SPLIT.test_from], asked(), seed=0).n == len(asked())
    with pytest.raises(LeakError, match=f"after asof = {SPLIT.test_from}"): evaluate(fitted[SPLIT.test_from + 1], asked(), seed=0)


def judged(values: np.ndarray, name: str = "m") -> Evaluation:
    return Evaluation(name, {"ndcg@10": values}, {}, pl.DataFrame(), 0, 0, len(values), 0, 0, "k", np.arange(len(values)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-.1, .1), st.floats(-.1, .1), st.sampled_from([1, 99, 100, 300]))
def test_a_promotion_is_always_earned(seed: int, over_champion: float, over_baseline: float, n: int):
    rng = np.random.default_rng(seed)
    new = rng.random(n)
    champion, baseline = judged(new - over_champion + rng.normal(0, .1, n)), judged(new - over_baseline + rng.normal(0, .1, n))
    decision = decide(judged(new), champion=champion, baseline=baseline, seed=0)
    assert decision.reasons[0].startswith("promoted" if decision.promote else "refused")
    if n < 100: assert not decision.promote and not decision.gains and f"{n} cases" in decision.reasons[0]
    else: assert decision.promote == (decision.gains["champion"].low > -.002 and decision.gains["baseline"].low > 0)


def test_doubt_is_refused_and_the_same_model_too():
    rng = np.random.default_rng(0)
    new, noise = rng.random(200), rng.normal(0, .3, 200)
    noise -= noise.mean()
    champion, baseline = judged(new + noise), judged(new - .2)  # as good on the mean, but who knows
    decision = decide(judged(new), champion=champion, baseline=baseline, seed=0)
    assert not decision.promote and "may be worse" in decision.reasons[2] and abs(decision.gains["champion"].mean) < 1e-9
    assert decide(judged(new), champion=champion, baseline=baseline, seed=0, tolerance=.1).promote
    unsure = decide(judged(new), champion=None, baseline=judged(new + noise - .01), seed=0)  # better on the mean
    assert not unsure.promote and "not better than the baseline" in unsure.reasons[1] and unsure.gains["baseline"].mean > 0
    assert not decide(judged(new), champion=judged(new.copy()), baseline=baseline, seed=0).promote


def test_gates_need_comparable_evaluations():
    a, b = judged(np.zeros(200)), judged(np.zeros(300))
    with pytest.raises(ValueError, match="other cases"): decide(a, champion=b, baseline=a, seed=0)
    with pytest.raises(ValueError, match="recall@3"): decide(a, champion=None, baseline=a, seed=0, metric="recall@3")
    assert "nobody answers" in decide(a, champion=None, baseline=a, seed=0).reasons[0]
    some = judged(np.linspace(0, 1, 200))
    assert decide(some, champion=None, baseline=some, seed=0).promote  # the baseline takes an empty place
