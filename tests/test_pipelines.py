"""The pipelines on the three kinds of data that a shop may have, and on the ways in which a retrain may end."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest

from recsys.lake.tables import Lake
from recsys.models import bundle, recipes, release
from recsys.models.contract import Filled
from recsys.models.manifest import manifest
from recsys.models.recipes import Recipe
from recsys.ops import flows
from recsys.ops.flows import FlowError
from recsys.prep.sequences import Sequences
from recsys.schema import EVENTS, ITEM_ID, ITEMS, TS, TS_IS_ORDER
from recsys.settings import Home, load
from recsys.simulator import Size, World
from recsys.synth import DAY, T0, checkerboard, shop
from recsys.training.evaluate import Evaluation


def opened(folder: Path, events: pl.DataFrame, items: pl.DataFrame | None = None) -> Home:
    home = Home.open(folder)
    Lake(home.lake).append("events", events.select(list(EVENTS)))
    if items is not None: Lake(home.lake).append("items", items.select(list(ITEMS)))
    return home


def retrain(home: Home, **params: str) -> dict[str, Any]:
    done = flows.run("retrain", params, home=home, settings=load(home=home.path), runs=home.path / "runs")
    assert done.status == "done" and [s.status for s in done.steps] == ["done"] * 5 and done.data_version == Lake(home.lake).version("events")
    return json.loads((Path(done.folder) / "05_publish.json").read_text())


def slate(home: Home, history: list[str]) -> list[str | None]:
    found = release.load(bundle.champion(home.registry))
    first, *rest = found.models.values()
    model = Filled(first, rest[0]) if rest else first
    query = Sequences.from_lists([found.vocab.encode(history)])
    return found.vocab.decode(model.recommend(query, k=5, exclude=query).items[0])


def test_a_shop_with_times_from_first_champion_to_refusal(tmp_path):
    world = World(Size(400, 150, 24), start_ms=1_767_225_600_000)
    days = list(world.events())
    home = opened(tmp_path / "home", pl.concat(days[:-2]), world.items)
    first = retrain(home, epochs="1")
    assert first["promoted"] and first["recipe"].startswith("covisit") and first["cases"] >= 100 and first["champion"] == first["bundle"]
    about = manifest(bundle.champion(home.registry)).about
    assert about["model"] == "covisit" and about["metrics"]["ndcg"]["low"] > 0 and about["k"] == 10 and about["asof"] == about["data"]["last"] + 1
    assert all(slate(home, [days[0][ITEM_ID].drop_nulls()[0]]))

    Lake(home.lake).append("events", pl.concat(days[-2:]).select(list(EVENTS)))
    worse = retrain(home, model="popular")
    assert not worse["promoted"] and worse["bundle"] != worse["champion"] == first["champion"]
    assert any("may be worse than the champion" in r or "baseline does" in r for r in worse["reasons"])
    assert len(bundle.list_bundles(home.registry)) == 2  # kept, for whoever wants to look

    fresh = retrain(home)
    assert fresh["promoted"] and fresh["champion"] == fresh["bundle"] != first["champion"]
    assert bundle.rollback(home.registry).bundle == first["champion"]


def test_data_that_hold_only_an_order(tmp_path):
    board = checkerboard(users=240, items=60, groups=4)
    ordered = board.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias(TS), pl.lit(True).alias(TS_IS_ORDER))
    home = opened(tmp_path / "home", ordered.with_columns(known_ts=pl.col(TS)))
    found = retrain(home)
    assert found["promoted"] and found["recipe"].startswith("covisit(gap_days=None, half_life_days=None")
    assert {int(i[1:]) % 4 for i in slate(home, ["i1", "i5"])} == {1}


def test_a_network_in_a_retrain_meets_the_same_gate(tmp_path):
    "Fitted twice with the same passes, and judged against what counts, too."
    board = checkerboard(users=240, items=60, groups=4)
    ordered = board.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias(TS), pl.lit(True).alias(TS_IS_ORDER))
    home = opened(tmp_path / "home", ordered.with_columns(known_ts=pl.col(TS)))
    found = retrain(home, model="blend", epochs="1")
    train = json.loads(next(home.work.glob("*-retrain/train.json")).read_text())
    assert train["recipe"]["model"] == "blend" and train["epochs"] == 1 and set(found["decision"]["gains"]) == {"baseline", "counts"}
    if not found["decision"]["promote"]: assert found["recipe"].startswith("popular") and any("than the counts" in r for r in found["reasons"])
    parts = release.load(home.registry / "bundles" / found["bundle"]).models
    assert list(parts)[0] == ("blend" if found["decision"]["promote"] else "popular")


def by_hand(home: Home, *steps: str, **params: str) -> None:
    "Pipelines in this process, cell by cell."
    for step in steps:
        space: dict[str, Any] = {}
        with pl.Config():
            for cell in json.loads((Path(__file__).parents[1] / "nbs" / "pipelines" / f"{step}.ipynb").read_text())["cells"]:
                if cell["cell_type"] == "code": exec("".join(cell["source"]), space)
                if "parameters" in cell["metadata"].get("tags", []): space |= {"home": str(home.path), **params}
        plt.close("all")
        space.clear()


def colours() -> tuple[pl.DataFrame, pl.DataFrame]:
    "Half of the shoppers like red, half of them blue. On day 17 of 20 one thing of each colour is launched, and half of what is looked at on the last two days is that."
    rng, rows = np.random.default_rng(0), []
    for user in range(120):
        liked = [f"i{2 * n + user % 2:02}" for n in rng.permutation(12)[:6]]
        if user % 4 > 1: liked[5] = f"i{24 + user % 2}"
        days = [*rng.uniform(0, 16, 4), rng.uniform(16, 18), rng.uniform(18, 20)]
        rows += [(f"u{user:03}", item, T0 + int(day * DAY)) for item, day in zip(liked, days, strict=True)]
    views = pl.DataFrame(rows, schema=["user_id", "item_id", "ts"], orient="row").with_columns(type=pl.lit("view"), event_id=pl.lit("e") + pl.int_range(pl.len()).cast(pl.String), known_ts="ts")
    items = [{"item_id": f"i{n}" if n > 9 else f"i0{n}", "category": ("red", "blue")[n % 2], "available_from": T0 + 17 * DAY * (n > 23), "ts": T0} for n in range(28)]  # nobody meets the last two
    return pl.concat([pl.DataFrame(schema=EVENTS), views], how="diagonal"), pl.DataFrame(items, schema=ITEMS)


def test_the_network_of_a_retrain_knows_items_by_their_words(tmp_path):
    events, items = colours()
    home, early = opened(tmp_path / "home", events, items), events.filter(pl.col(TS) < T0 + 10 * DAY)
    recipe = Recipe("sequential", {"dim": 16, "tokens": 100, "lr": 2e-2, "dropout": 0.0, "length": 8, "dtype": "fp32"})
    fitted = recipes.fit(recipe, early, asof=T0 + 10 * DAY, epochs=10)  # without words, as any before them
    about = {"recipe": recipe.plain, "epochs": 10, "created": T0, "data": {}, "metrics": {}, "settings": {}}
    bundle.promote(home.registry, release.write_bundle(list(fitted.values()), items, registry=home.registry, about=about).name, reason="by hand")

    by_hand(home, "prepare", "features", "train", "evaluate", "publish", run_id="one")
    found = release.load(bundle.champion(home.registry))
    network = found.models["sequential"]
    assert len(network.words) and manifest(found.manifest.path).about["run_id"] == "one"  # it passed the gate, though counting knows colours, too
    red, blue, new_red, new_blue = ([found.vocab.encode([f"i{n:02}"])[0] for n in numbers] for numbers in ((0, 2, 4), (1, 3, 5), (26,), (27,)))
    after_red, after_blue = network.scores(Sequences.from_lists([red, blue]))
    assert network.counts[new_red + new_blue].sum() == 0
    assert (after_red[new_red] > 1 / 28 > after_red[new_blue]).all() and (after_blue[new_blue] > 1 / 28 > after_blue[new_red]).all()

    by_hand(home, "train", "evaluate", run_id="one", model="covisit")  # another challenger: the network is fitted again as the champion
    judged = {role: Evaluation.read(home.work / "one" / "evaluation" / role) for role in ("challenger", "baseline", "champion")}
    assert len({e.key for e in judged.values()}) == 1 and judged["champion"].name.startswith("sequential")
    new = {role: e.slices.filter(slice="new items", metric="ndcg@10")["mean"].item() for role, e in judged.items()}
    assert new["champion"] > 0.3 > 0.1 > max(new["challenger"], new["baseline"])


def test_a_new_shop_starts_somewhere(tmp_path):
    world = shop()
    home = opened(tmp_path / "home", world.events.head(1), world.items)
    alone = retrain(home)
    assert alone["promoted"] and alone["recipe"] == "popular" and alone["cases"] == 0 and alone["metrics"] == {}
    assert "popular items, until there is something better" in alone["reasons"][0]
    assert slate(home, [])[0] == "mug" and len(slate(home, [])) == 5
    Lake(home.lake).append("events", world.events.slice(1))
    asked = retrain(home, model="covisit")
    assert not asked["promoted"] and "decide nothing" in asked["reasons"][0] and asked["champion"] == alone["bundle"]


@pytest.mark.long
def test_a_small_shop_keeps_up_with_its_data_and_only_with_them(tmp_path):
    world = shop()
    home = opened(tmp_path / "home", world.events.head(4), world.items)
    first = retrain(home)
    Lake(home.lake).append("events", world.events.slice(4))
    more = retrain(home)
    assert more["promoted"] and "too few to compare" in more["reasons"][0] and more["recipe"] == "popular"
    Lake(home.lake).compact("events")  # another version of the same data
    idle = retrain(home)
    assert not idle["promoted"] and idle["bundle"] is None and "nothing new" in idle["reasons"][0]
    assert idle["champion"] == more["champion"] != first["champion"]
    Lake(home.lake).append("items", world.items.head(1).with_columns(title=pl.lit("a mug with a lid"), ts=pl.col("ts") + 1))  # no event, but other words
    assert retrain(home)["bundle"] not in (None, more["champion"])


def test_an_empty_lake_says_what_to_do(tmp_path):
    with pytest.raises(FlowError, match="the lake holds no events; bring some: recsys ingest"): retrain(Home.open(tmp_path / "home"))


def test_ingest_as_a_flow(tmp_path):
    path = tmp_path / "events.jsonl"
    rows = shop().events.select("event_id", "user_id", "item_id", "type", "ts").to_dicts()
    path.write_text("\n".join(json.dumps(r) for r in [*rows, rows[0], {**rows[0], "event_id": "x", "type": "click"}]))
    home = Home.open(tmp_path / "home")
    done = flows.run("ingest", {"path": str(path), "format": "jsonl"}, home=home, settings=load(home=home.path), runs=tmp_path / "runs")
    found = json.loads((Path(done.folder) / "01_ingest.json").read_text())
    assert (found["read"], found["accepted"], found["duplicates"], found["quarantined"]) == (len(rows) + 2, len(rows), 1, 1)
    assert Lake(home.lake).rows("events") == len(rows) and done.data_version == found["data_version"]
    with pytest.raises(FlowError, match="format = 'xml': must be one of jsonl, csv"):
        flows.run("ingest", {"path": str(path), "format": "xml"}, home=home, settings=load(home=home.path), runs=tmp_path / "runs")
