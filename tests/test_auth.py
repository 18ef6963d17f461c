"""Keys across processes, and against whatever text somebody sends."""
from __future__ import annotations

import hmac
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.serving import auth
from recsys.serving.auth import SCOPES, AuthError, KeyRefused, Keys, ScopeMissing

OTHER = "import sys; from recsys.serving.auth import Keys; k = Keys(sys.argv[1]); {}"


def elsewhere(folder: Path, code: str) -> str:
    "Do something with the keys of a folder in another process."
    return subprocess.run([sys.executable, "-c", OTHER.format(code), str(folder)], capture_output=True, text=True, check=True).stdout.strip()


def test_another_process_makes_and_ends_keys(tmp_path: Path):
    keys = Keys(tmp_path)
    key = elsewhere(tmp_path, "print(k.create(['recs:read'], name='other'))")
    assert keys.check(key, "recs:read").name == "other"
    elsewhere(tmp_path, f"k.revoke({key!r})")
    with pytest.raises(KeyRefused, match="revoked"): keys.check(key, "recs:read")
    assert not keys.valid(key) and keys.list()[0].revoked is not None
    keys.close()


def test_only_hashes_are_kept_and_only_the_owner_reads_them(tmp_path: Path):
    keys = Keys(tmp_path / "keys")
    key = keys.create(SCOPES, name="all")
    stored = b"".join(p.read_bytes() for p in (tmp_path / "keys").iterdir())
    assert key.encode() not in stored and key.split("_", 2)[2].encode() not in stored
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "keys").iterdir()) and key.split("_", 2)[2] not in repr(keys.list())
    keys.close()


def test_expiry_is_judged_at_each_request(tmp_path: Path):
    now = [1_000_000]
    keys = Keys(tmp_path, clock=lambda: now[0])
    key, forever = keys.create(["admin"], name="day", expires_days=1), keys.create(["admin"], name="forever")
    now[0] += 86_400_000 - 1
    assert keys.valid(key)
    now[0] += 1
    assert not keys.valid(key) and keys.valid(forever) and keys.list()[0].expires == now[0]
    keys.close()


@pytest.mark.parametrize(("scopes", "days", "said"), [(["recs:write"], None, "recs:write"), ([], None, "no scope"), (["admin"], 0, "expires_days"),
                                                      (["admin"], -1, "expires_days"), (["admin"], float("nan"), "expires_days")])
def test_a_key_that_makes_no_sense_is_not_made(tmp_path: Path, scopes: list[str], days: float | None, said: str):
    keys = Keys(tmp_path)
    with pytest.raises(AuthError, match=said): keys.create(scopes, name="x", expires_days=days)
    assert keys.list() == []
    with pytest.raises(AuthError, match="recsys keys list"): keys.revoke("0" * 12)
    keys.close()


def test_a_scope_opens_nothing_else(tmp_path: Path):
    keys = Keys(tmp_path)
    made = {scope: keys.create([scope], name=scope) for scope in SCOPES}
    for has, key in made.items():
        for needed in SCOPES:
            if has == needed: assert keys.check(key, needed).scopes == (has,)
            else:
                with pytest.raises(ScopeMissing): keys.check(key, needed)
    keys.close()


def test_secrets_are_compared_in_constant_time_also_where_there_is_no_such_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys, compared = Keys(tmp_path), []
    key = keys.create(["admin"], name="x")
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b, real=hmac.compare_digest: compared.append((len(a), len(b))) or real(a, b))
    for text in (key, key[:-1] + ("A" if key[-1] != "A" else "Q"), "rk_" + "0" * 12 + key[15:]): keys.valid(text)
    assert compared == [(32, 32)] * 3
    keys.close()


@pytest.fixture(scope="module")
def one_key(tmp_path_factory: pytest.TempPathFactory):
    keys = Keys(tmp_path_factory.mktemp("fuzzed"))
    keys.create(["admin"], name="x")
    yield keys
    keys.close()


@given(text=st.one_of(st.none(), st.text(), st.from_regex(r"rk_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", fullmatch=True)))
@settings(max_examples=300, deadline=None)
def test_no_other_text_is_a_key(one_key: Keys, text: str | None):
    assert not one_key.valid(text)


def test_many_threads_share_one_object(tmp_path: Path):
    keys = Keys(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: keys.create(["recs:read"], name=str(n)), range(64)))
        assert all(pool.map(keys.valid, made)) and len(set(made)) == 64
        list(pool.map(keys.revoke, made[:32]))
        assert list(pool.map(keys.valid, made)) == [False] * 32 + [True] * 32
    keys.close()
