"""The data cache: one process makes a folder, the others wait for it, and nobody is led astray by what lies around."""

import json
import logging
import os
import threading
import time

import pytest

from fvae_dist.training import data_cache
from fvae_dist.training.data_cache import build_or_load, wait_and_load
from fvae_dist.training.recipe import RecipeError


def load(folder):
    return (folder / "value").read_text()


def build(folder):
    (folder / "value").write_text("made")


def never(folder):
    raise AssertionError("nobody should build")


def failing(error):
    def build(folder):
        raise error

    return build


class Waiting(threading.Thread):
    """A waiting process, played by a thread; `outcome` is what it got."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.outcome = folder, None
        self.start()

    def run(self):
        try:
            self.outcome = wait_and_load(self.folder, load, timeout_s=10)
        except Exception as error:
            self.outcome = error


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(data_cache, "_POLL_S", 0.01)
    return tmp_path / "cache" / "key"


def test_build_or_load_builds_once_and_leaves_only_the_folder_and_its_lock(folder):
    assert build_or_load(folder, build, load) == "made"
    assert build_or_load(folder, never, load) == "made"
    assert wait_and_load(folder, load) == "made"
    assert {path.name for path in folder.parent.iterdir()} <= {"key", "key.lock"}


def test_racing_builders_build_once(folder):
    built, gate = [], threading.Barrier(4)

    def slow_build(target):
        time.sleep(0.05)
        build(target)
        built.append(target)

    def race():
        gate.wait()
        assert build_or_load(folder, slow_build, load) == "made"

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and load(folder) == "made"


def test_waiting_process_sees_only_the_complete_folder(folder):
    waiting, half_made = Waiting(folder), threading.Event()

    def slow_build(target):
        (target / "other").touch()
        half_made.set()
        time.sleep(0.05)
        assert waiting.outcome is None
        build(target)

    build_or_load(folder, slow_build, load)
    waiting.join()
    assert half_made.is_set() and waiting.outcome == "made"


def test_builders_recipe_error_reaches_the_waiting_process(folder):
    waiting = Waiting(folder)
    with pytest.raises(RecipeError, match=r"data.jsonl:3: bad"):
        build_or_load(folder, failing(RecipeError("data.jsonl:3: bad")), load)
    waiting.join()
    assert isinstance(waiting.outcome, RecipeError) and str(waiting.outcome) == "data.jsonl:3: bad"
    assert not folder.exists() and not list(folder.parent.glob("*.tmp-*"))
    # A process of the same launch that comes late, after the failure, hears of it too.
    with pytest.raises(RecipeError, match=r"data.jsonl:3: bad"):
        wait_and_load(folder, load, timeout_s=5)


def test_builders_other_error_ends_the_wait_too(folder):
    with pytest.raises(MemoryError):
        build_or_load(folder, failing(MemoryError("too\nlarge")), load)
    with pytest.raises(RuntimeError, match="prepares the data failed: too large"):
        wait_and_load(folder, load, timeout_s=5)


@pytest.mark.parametrize("left_by", ["an hour ago", "another launch"])
def test_failure_of_an_earlier_launch_is_ignored_by_waiting_and_removed_by_building(folder, left_by, monkeypatch):
    with pytest.raises(RecipeError):
        build_or_load(folder, failing(RecipeError("old")), load)
    failed = folder.with_name("key.failed")
    if left_by == "an hour ago":
        os.utime(failed, (time.time() - 3600 * 24 * 365,) * 2)  # before this process, whatever it is, began
    else:
        monkeypatch.setenv("MASTER_PORT", "12345")
    waiting = Waiting(folder)
    time.sleep(0.05)
    assert waiting.outcome is None
    assert build_or_load(folder, build, load) == "made"
    waiting.join()
    assert waiting.outcome == "made" and not failed.exists()


def test_failure_that_replaces_an_old_one_is_heard_whatever_the_clock_says(folder):
    failed = folder.with_name("key.failed")
    failed.parent.mkdir()
    failed.write_text(json.dumps({"launch": [], "recipe_error": True, "message": "old"}))
    waiting = Waiting(folder)
    time.sleep(0.05)
    with pytest.raises(RecipeError, match="new"):
        build_or_load(folder, failing(RecipeError("new")), load)
    waiting.join()
    assert str(waiting.outcome) == "new"


def test_unreadable_folder_is_made_anew_with_a_warning(folder, caplog):
    folder.mkdir(parents=True)
    (folder / "rubbish").touch()
    waiting = Waiting(folder)
    time.sleep(0.03)
    with caplog.at_level(logging.WARNING):
        assert build_or_load(folder, build, load) == "made"
    waiting.join()
    assert waiting.outcome == "made" and not (folder / "rubbish").exists()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be read" in caplog.text and "making it anew" in caplog.text


def test_folder_that_stays_unreadable_ends_the_wait(folder, monkeypatch):
    monkeypatch.setattr(data_cache, "_UNREADABLE_GRACE_S", 0.03)
    folder.mkdir(parents=True)
    with pytest.raises(RuntimeError, match="cannot be read"):
        wait_and_load(folder, load, timeout_s=5)


def test_leftovers_of_a_killed_builder_are_removed(folder):
    leftover = folder.with_name("key.tmp-host-1")
    leftover.mkdir(parents=True)
    (leftover / "value").write_text("half")
    assert build_or_load(folder, build, load) == "made"
    assert not leftover.exists()


def test_wait_has_a_time_limit_only_if_asked(folder, capfd):
    with pytest.raises(TimeoutError, match=r"no tokenised data after 0.05 s"):
        wait_and_load(folder, load, timeout_s=0.05)
    assert capfd.readouterr() == ("", "")
