"""The vault's keys: made once by many, readable by one, and never mistaken."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.lake.vault import Vault, VaultError

FIXED = Vault(b"p" * 32, b"s" * 32)
OPEN = "import sys; from recsys.lake.vault import Vault; sys.stdin.read(1); print(Vault.open(sys.argv[1]).pseudonym('ann'))"


def test_processes_that_start_together_get_the_same_key(tmp_path: Path):
    folder = tmp_path / "keys"
    waiting = [subprocess.Popen([sys.executable, "-c", OPEN, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    for process in waiting:
        assert process.stdin
        process.stdin.write("x"); process.stdin.flush()
    names = {process.communicate(timeout=300)[0].strip() for process in waiting}
    assert names == {Vault.open(folder).pseudonym("ann")}
    assert sorted(path.name for path in folder.iterdir()) == ["pseudonym.key", "seal.key"]  # no drafts are left


def test_a_key_is_its_owners_only(tmp_path: Path):
    old = os.umask(0)
    try: Vault.open(tmp_path / "keys")
    finally: os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()} == {0o600}
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int):
    Vault.open(tmp_path)
    (tmp_path / "pseudonym.key").chmod(mode)
    with pytest.raises(VaultError, match="chmod 600 .*pseudonym.key"): Vault.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_damaged_key_is_never_replaced_by_a_new_one(tmp_path: Path, content: bytes):
    Vault.open(tmp_path)
    (tmp_path / "seal.key").write_bytes(content)
    with pytest.raises(VaultError, match="restore it"): Vault.open(tmp_path)
    assert (tmp_path / "seal.key").read_bytes() == content


def test_two_installations_share_no_pseudonym(tmp_path: Path):
    assert Vault.open(tmp_path / "a").pseudonym("ann") != Vault.open(tmp_path / "b").pseudonym("ann")


@given(st.lists(st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]))), max_size=20))
def test_a_column_is_hashed_as_its_values_are(texts: list[str | None]):
    hashed = FIXED.pseudonyms(pl.Series("user_id", texts, dtype=pl.String), kind="session")
    assert hashed.dtype == pl.String and hashed.to_list() == [None if t is None else FIXED.pseudonym(t, kind="session") for t in texts]


@given(st.text(), st.text(), st.sampled_from(["user", "session"]), st.sampled_from(["user", "session"]))
def test_different_names_get_different_pseudonyms(a: str, b: str, kind_a: str, kind_b: str):
    first, second = FIXED.pseudonym(a, kind=kind_a), FIXED.pseudonym(b, kind=kind_b)
    assert len(first) == 32 and int(first, 16) >= 0
    assert (first == second) == ((a, kind_a) == (b, kind_b))


@given(st.binary(max_size=300), st.data())
def test_a_sealed_record_opens_whole_or_not_at_all(plain: bytes, data: st.DataObject):
    sealed = FIXED.seal(plain)
    assert FIXED.unseal(sealed) == plain and len(sealed) == len(plain) + 29
    spot = data.draw(st.integers(0, len(sealed) - 1))
    with pytest.raises(VaultError): FIXED.unseal(sealed[:spot])
    with pytest.raises(VaultError): FIXED.unseal(sealed[:spot] + bytes([sealed[spot] ^ 1]) + sealed[spot + 1:])
    with pytest.raises(VaultError, match="another key"): Vault(b"p" * 32, b"t" * 32).unseal(sealed)
