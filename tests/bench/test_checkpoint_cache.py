"""Written checkpoints take a bounded part of the disk."""

import os
from pathlib import Path

import psutil
import pytest

from scripts import checkpoint_cache

FILE_BYTES = 1000


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are kept, with room for two beside the one being written."""
    monkeypatch.setattr(checkpoint_cache, "CACHE", tmp_path)
    monkeypatch.setattr(checkpoint_cache, "KEPT_BYTES", 2 * FILE_BYTES)
    return tmp_path / "checkpoints"


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(FILE_BYTES))
    return path


def ask(name: str, *, hour: int) -> Path:
    """Ask for a file, and have it asked for at that hour."""
    path = checkpoint_cache.cached(name, write)
    assert path.stat().st_size == FILE_BYTES
    os.utime(path, (3600 * hour,) * 2)
    return path


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*/*.safetensors")}


def test_the_longest_unused_file_makes_way(folder: Path) -> None:
    for hour, name in enumerate(("a", "b", "c")):
        ask(name, hour=hour)
    assert names(folder) == {"a", "b", "c"}
    ask("d", hour=4)
    assert names(folder) == {"b", "c", "d"}


def test_files_that_another_process_just_asked_for_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = os.getpid(), os.getppid()
    monkeypatch.setattr(os, "getpid", lambda: other)
    ask("a", hour=0)
    old = ask("b", hour=1)
    monkeypatch.setattr(os, "getpid", lambda: own)
    (asked,) = old.parent.glob(f"{old.name}.*")
    os.utime(asked, (0, 0))
    for hour, name in enumerate("cdef", start=2):
        ask(name, hour=hour)
    assert names(folder) == set("adef")
    assert not asked.exists()
    monkeypatch.setattr(psutil, "pid_exists", lambda process: process == own)
    ask("g", hour=6)
    assert names(folder) == set("efg")


def test_what_a_process_asked_with_goes_when_it_has_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, ended, other = os.getpid(), 1 << 30, os.getppid()
    for process in (ended, other, own):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        ask("a", hour=0)
    # Nothing was written since, and there is room for all.
    assert {path.name for path in folder.glob("*/*.asked")} == {f"a.safetensors.{pid}.asked" for pid in (other, own)}


def test_asking_for_a_file_is_a_use(folder: Path) -> None:
    for hour, name in enumerate(("a", "b", "c")):
        ask(name, hour=hour)
    checkpoint_cache.cached("a", write)
    ask("d", hour=4)
    assert names(folder) == {"a", "c", "d"}


def test_files_of_full_size_stay_and_do_not_count(folder: Path) -> None:
    for hour, name in enumerate(("zimage-full", "flux-full-layers2", "a", "b", "c")):
        ask(name, hour=hour)
    assert names(folder) == {"zimage-full", "a", "b", "c", "flux-full-layers2"}
    ask("d", hour=6)
    assert names(folder) == {"zimage-full", "flux-full-layers2", "b", "c", "d"}


def test_files_of_another_writing_code_are_deleted(folder: Path) -> None:
    other = write(folder / "older" / "a.safetensors")
    ask("a", hour=0)
    assert not other.exists()


def test_a_file_that_another_process_deletes_meanwhile_is_passed_over(folder: Path) -> None:
    path = ask("a", hour=0)
    path.with_name("gone.safetensors").symlink_to(path.with_name("not there"))
    for hour, name in enumerate(("b", "c", "d"), start=1):
        ask(name, hour=hour)
    assert names(folder) - {"gone"} == {"b", "c", "d"}
