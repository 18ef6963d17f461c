"""A bundle is whole or refused, and a champion stays until a sound one replaces it, whatever is broken, killed or raced."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recsys.models import bundle
from recsys.models import manifest as manifests
from recsys.models.bundle import champion, current, history, list_bundles, promote, prune, rollback
from recsys.models.manifest import BundleError, manifest, verify, write


def _parts(text: str) -> dict:
    def model(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights.bin").write_bytes(text.encode() * 1000)
        (folder / "model.json").write_text("{}")
    return {"model": model, "items.parquet": lambda path: path.write_text(text)}


def _write(registry: Path, text: str = "a", created: int = 1) -> Path:
    return write(registry, _parts(text), about={"created": created, "metrics": {"ndcg": 0.5}})


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    "A registry with a champion and a better bundle."
    promote(tmp_path, _write(tmp_path, "old").name, reason="first", at=1)
    return tmp_path


def _set(path: Path, old: bytes, new: bytes) -> None: path.write_bytes(path.read_bytes().replace(old, new, 1))


BREAK = {
    "byte": (lambda b: _set(b / "model/weights.bin", b"new", b"nEw"), "model/weights.bin"),
    "truncated": (lambda b: os.truncate(b / "model/weights.bin", 100), "model/weights.bin"),
    "longer": (lambda b: os.truncate(b / "model/weights.bin", 10_000), "model/weights.bin"),
    "emptied": (lambda b: os.truncate(b / "items.parquet", 0), "items.parquet"),
    "missing": (lambda b: (b / "items.parquet").unlink(), "items.parquet"),
    "extra": (lambda b: (b / "model/more.bin").write_bytes(b"x"), "model/more.bin"),
    "hidden": (lambda b: (b / ".hidden").write_bytes(b"x"), ".hidden"),
    "metric raised": (lambda b: _set(b / "manifest.json", b"0.5", b"0.9"), "manifest.json"),
    "hash swapped": (lambda b: _set(b / "manifest.json", b'"sha256": "', b'"sha256": "0'), "manifest.json"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "manifest.json"),
    "manifest is a folder": (lambda b: ((b / "manifest.json").unlink(), (b / "manifest.json").mkdir()), "manifest.json"),
    "link": (lambda b: ((b / "items.parquet").unlink(), (b / "items.parquet").symlink_to("/etc/hostname")), "items.parquet"),
    "linked folder": (lambda b: ((b / "model").rename(b.parent / "moved"), (b / "model").symlink_to(b.parent / "moved")), "model"),
    "pipe": (lambda b: ((b / "items.parquet").unlink(), os.mkfifo(b / "items.parquet")), "items.parquet"),
}


@pytest.mark.parametrize("how", BREAK)
def test_broken_bundles_are_refused_by_the_file_and_the_champion_stays(registry: Path, how: str) -> None:
    old, new = champion(registry), _write(registry, "new")
    change, named = BREAK[how]
    change(new)
    for act in (lambda: verify(new), lambda: promote(registry, new.name, reason="better")):
        with pytest.raises(BundleError) as refusal: act()
        assert f"{new}/{named}:" in str(refusal.value)
    assert champion(registry) == old and verify(old) and len(history(registry)) == 1


def test_every_byte_of_a_bundle_is_vouched_for(tmp_path: Path) -> None:
    path = write(tmp_path, {"w.bin": lambda p: p.write_bytes(bytes(range(40)))}, about={"created": 1})
    for file in ("w.bin", "manifest.json"):
        good = (path / file).read_bytes()
        for at in range(len(good)):
            (path / file).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
            with pytest.raises(BundleError, match=file): verify(path)
        (path / file).write_bytes(good)
    assert verify(path).id == path.name


def _forged(registry: Path, change) -> Path:
    "A bundle whose manifest was changed and whose folder was named to match: what somebody with access could make."
    source = _write(registry, "forged")
    wire = json.loads((source / "manifest.json").read_text())
    text = json.dumps(change(wire) or wire).encode()
    (source / "manifest.json").write_bytes(text)
    return source.rename(source.parent / manifests._id(text))


@pytest.mark.parametrize("name", ["../../champion.json", "/etc/hostname", "model/../../x", "..", ".", "", "model//x", "a\\..\\b", "a\0b", "a\nb", "manifest.json", ".x"])
def test_a_manifest_cannot_name_a_file_outside(registry: Path, name: str) -> None:
    def add(wire): wire["files"][name] = {"sha256": "0" * 64, "bytes": 0}
    path = _forged(registry, add)
    with pytest.raises(BundleError, match="plain relative name inside the bundle"): promote(registry, path.name, reason="x")


@pytest.mark.parametrize("change", [
    lambda w: w.update(format=2), lambda w: w.pop("files"), lambda w: w.update(more=1), lambda w: w.update(files=[]), lambda w: [1],
    lambda w: w["files"].update({"items.parquet": {"sha256": 1, "bytes": "x"}}), lambda w: w.update(about={"deep": eval("[" * 50 + "]" * 50)}, format="1")])
def test_a_forged_manifest_is_refused_by_name(registry: Path, change) -> None:
    path = _forged(registry, change)
    with pytest.raises(BundleError, match="manifest.json: not a manifest of format 1"): verify(path)
    assert [e.problem is None for e in list_bundles(registry)].count(False) == 1


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'{"number": 1, "bundle": "../../../etc", "previous": [], "reason": "", "at": 1}'])
def test_a_damaged_pointer_is_named_and_a_promotion_mends_it(registry: Path, text: bytes) -> None:
    old, new = champion(registry), _write(registry, "new")
    (registry / "champion.json").write_bytes(text)
    for act in (lambda: champion(registry), lambda: current(registry)):
        with pytest.raises(BundleError, match="champion.json.*promote a bundle by its id"): act()
    assert promote(registry, new.name, reason="mend").previous == (old.name,)
    assert champion(registry) == new and [c.number for c in history(registry)] == [1, 2]


def test_ids_that_are_no_ids_are_refused(registry: Path) -> None:
    for name in ("", ".", "..", "../x", "/etc", "A" * 32, "0" * 31, "0" * 33, "0" * 32 + "\n"):
        with pytest.raises(BundleError, match="32 hex digits"): promote(registry, name, reason="x")


def test_a_rollback_goes_back_and_on_back_and_survives_what_was_deleted(registry: Path) -> None:
    a = champion(registry)
    b, c = _write(registry, "b"), _write(registry, "c")
    promote(registry, b.name, reason="b")
    promote(registry, c.name, reason="c")
    assert rollback(registry).bundle == b.name and rollback(registry).bundle == a.name
    with pytest.raises(BundleError, match="no champion to go back to"): rollback(registry)
    promote(registry, c.name, reason="again")
    promote(registry, c.name, reason="twice")  # is not its own predecessor
    assert rollback(registry).bundle == a.name
    promote(registry, c.name, reason="again")
    shutil.rmtree(a)
    with pytest.raises(BundleError, match=a.name): rollback(registry)
    assert champion(registry) == c and [x.number for x in history(registry)] == list(range(1, 10))


def test_a_part_that_fails_leaves_nothing(registry: Path) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")
    before = sorted((registry / "bundles").iterdir())
    with pytest.raises(OSError, match="No space left"): write(registry, {**_parts("x"), "z": fails}, about={"created": 1})
    for about, said in (({}, "created"), ({"created": 1, "x": float("nan")}, "NaN"), ({"created": 1, "x": Path("x")}, "JSON")):
        with pytest.raises(BundleError, match=said): write(registry, _parts("x"), about=about)
    for name in ("../x", "a/b", ".a", "", "manifest.json"):
        with pytest.raises(BundleError, match="plain name"): write(registry, {name: lambda p: None}, about={"created": 1})
    assert sorted((registry / "bundles").iterdir()) == before


def test_the_same_contents_are_one_bundle_and_a_broken_twin_is_not_taken_for_it(registry: Path) -> None:
    path = _write(registry, "same")
    assert _write(registry, "same") == path and _write(registry, "same", created=2) != path
    os.truncate(path / "items.parquet", 1)
    with pytest.raises(BundleError, match="items.parquet"): _write(registry, "same")


def test_prune_keeps_the_champion_what_it_replaced_and_what_is_being_written(registry: Path) -> None:
    first, made = champion(registry), [_write(registry, f"n{n}", created=10 + n) for n in range(6)]
    promote(registry, made[0].name, reason="x")
    entered, leave = threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        path.write_text("slow")
        entered.set()
        assert leave.wait(120)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write, registry, {"slow": slow}, about={"created": 99})
        assert entered.wait(120)
        gone = prune(registry, keep=2)
        leave.set()
        slow_bundle = writing.result()
    assert set(gone) == {m.name for m in made[1:4]}
    assert {e.id for e in list_bundles(registry)} == {first.name, made[0].name, made[4].name, made[5].name, slow_bundle.name}
    assert verify(slow_bundle) and prune(registry, keep=9) == []


# --- kill -9, in other processes ---

def _run(code: str, *args: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True)


WRITE = """
import sys, time
from pathlib import Path
from recsys.models.manifest import write
def half(path):
    path.mkdir(); (path / "weights.bin").write_bytes(b"x" * 100000)
    print("half", flush=True); time.sleep(60)
write(sys.argv[1], {"whole": lambda p: p.write_text("w"), "half": half}, about={"created": 1})
"""

PROMOTE = """
import sys
from recsys.models.bundle import promote
print("go", flush=True)
while True:
    for name in sys.argv[2:]: promote(sys.argv[1], name, reason="loop")
"""

PROMOTE_ONCE = """
import sys
from recsys.models.bundle import promote
for n in range(int(sys.argv[3])): promote(sys.argv[1], sys.argv[2], reason=f"{sys.argv[2]} {n}")
"""


def test_killed_while_writing_leaves_no_bundle(registry: Path) -> None:
    old, before = champion(registry), list_bundles(registry)
    with _run(WRITE, registry) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    hidden = [p for p in (registry / "bundles").iterdir() if p.name.startswith(".")]
    assert len(hidden) == 1 and list_bundles(registry) == before and champion(registry) == old
    assert prune(registry) == [] and not hidden[0].exists()


def _killed_promotions(registry: Path, rounds: int) -> None:
    a, b = champion(registry), _write(registry, "b")
    rng = random.Random(0)  # when to kill; where it hits differs from run to run
    for _ in range(rounds):
        with _run(PROMOTE, registry, a.name, b.name) as process:
            assert process.stdout.readline() == "go\n"
            time.sleep(rng.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
        assert champion(registry) in (a, b)
        numbers = [c.number for c in history(registry)]
        assert numbers == list(range(1, len(numbers) + 1)) and history(registry)[-1] == current(registry)
    assert verify(champion(registry)) and promote(registry, b.name, reason="after").bundle == b.name


def test_killed_while_promoting_leaves_one_champion_or_the_other(registry: Path) -> None: _killed_promotions(registry, 10)


@pytest.mark.long
def test_killed_while_promoting_many_times(registry: Path) -> None: _killed_promotions(registry, 200)


@pytest.mark.parametrize("step", ["verify", "_catch_up", "sync"])
def test_a_promotion_that_stops_between_two_steps_is_whole_or_nothing(registry: Path, monkeypatch, step: str) -> None:
    "Dies at the first, second, ... call of a step inside a promotion, as kill -9 would; the next promotion finds everything in order."
    class Killed(BaseException): pass
    real = getattr(bundle, step)
    for calls in range(1, 4):
        old, new, left = champion(registry), _write(registry, f"{step}{calls}"), calls

        def dies(*args):
            nonlocal left
            left -= 1
            if left == 0: raise Killed
            return real(*args)
        monkeypatch.setattr(bundle, step, dies)
        try: promote(registry, new.name, reason="x")
        except Killed: pass
        monkeypatch.setattr(bundle, step, real)
        assert champion(registry) in (old, new) and verify(champion(registry))
        promote(registry, new.name, reason="y")
        numbers = [c.number for c in history(registry)]
        assert champion(registry) == new and numbers == list(range(1, len(numbers) + 1))
        assert len((registry / "history.jsonl").read_bytes().splitlines()) == len(numbers)


def test_a_history_line_cut_short_is_caught_up(registry: Path) -> None:
    a, b = champion(registry), _write(registry, "b")
    promote(registry, b.name, reason="b")
    log = registry / "history.jsonl"
    os.truncate(log, log.stat().st_size - 5)
    assert [c.bundle for c in history(registry)] == [a.name, b.name]
    promote(registry, a.name, reason="c")
    assert [c.reason for c in history(registry)] == ["first", "b", "c"] and log.read_bytes().count(b"\n") == 3


def test_promotions_at_once_are_one_after_the_other(registry: Path) -> None:
    made = [_write(registry, f"n{n}") for n in range(4)]
    running = [_run(PROMOTE_ONCE, registry, m.name, 10) for m in made]
    seen = set()
    while any(p.poll() is None for p in running): seen.add(champion(registry))  # a reader never finds half a pointer
    for p in running: assert p.wait() == 0 and p.stdout.close() is None
    told = history(registry)
    assert [c.number for c in told] == list(range(1, 42)) and told[-1] == current(registry)
    assert {c.reason for c in told[1:]} == {f"{m.name} {n}" for m in made for n in range(10)}
    for before, after in zip(told, told[1:], strict=False):
        assert after.bundle == before.bundle or after.previous[0] == before.bundle
    assert seen <= {manifest(p).path for p in (registry / "bundles").iterdir()}
