"""Which checkpoint a run resumes from, what it refuses to train over, and that a damaged one is never taken."""

import json
import os
import shutil
import time

import pytest

from fvae_dist.training import checkpoint_files
from fvae_dist.training.checkpoint_files import MANIFEST, problem_with, publish, read_manifest, remove_leftovers
from fvae_dist.training.checkpoints import (
    check_output_dir,
    clear_output_dir,
    find_checkpoint,
    list_checkpoints,
)
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.resumable import CheckpointWriter
from fvae_dist.training.saving import ADAPTER_FILE
from tests.recipes import make_checkpoint, rewrite_manifest


def remove_adapter(folder):
    (folder / ADAPTER_FILE).unlink()


def cut_adapter(folder):
    (folder / ADAPTER_FILE).write_bytes((folder / ADAPTER_FILE).read_bytes()[:-1])


def remove_manifest(folder):
    (folder / MANIFEST).unlink()


def break_manifest(folder):
    (folder / MANIFEST).write_text("{")


def manifest_as_list(folder):
    (folder / MANIFEST).write_text("[]")


def edit_manifest(folder):
    manifest = read_manifest(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"global_batch_size": 1}))


def newer_format(folder):
    rewrite_manifest(folder, format=2)


def point_outside(folder):
    (folder.parent / "secret").write_text("x")
    entry = {"size": 1, "sha256": checkpoint_files.sha256(folder.parent / "secret")}
    rewrite_manifest(folder, files={"../secret": entry})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (remove_adapter, f"{ADAPTER_FILE} is missing"),
        (cut_adapter, f"{ADAPTER_FILE} has "),
        (remove_manifest, f"{MANIFEST} is missing or unreadable"),
        (break_manifest, f"{MANIFEST} is missing or unreadable"),
        (manifest_as_list, f"{MANIFEST} is missing or unreadable"),
        (edit_manifest, f"{MANIFEST} was changed"),
        (newer_format, "its format is 2, this version reads 1"),
        (point_outside, f"{MANIFEST} names ../secret, outside the checkpoint"),
    ],
)
def test_damaged_checkpoint_is_refused_with_the_reason(tmp_path, damage, problem):
    folder = make_checkpoint(tmp_path, 5)
    assert problem_with(folder) == ""
    assert find_checkpoint(str(folder), tmp_path) == str(folder)
    damage(folder)
    with pytest.raises(RecipeError, match=r"^--resume .*checkpoint-5: not a whole checkpoint: ") as caught:
        find_checkpoint(str(folder), tmp_path)
    assert problem in str(caught.value)
    assert find_checkpoint("auto", tmp_path) is None


def test_every_flipped_byte_is_found(tmp_path):
    """Every 7th byte of every file, and the last of each."""
    folder = make_checkpoint(tmp_path, 5)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in {*range(0, len(whole), 7), len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            assert problem_with(folder), f"byte {position} of {path.name}"
        path.write_bytes(whole)
    assert problem_with(folder) == ""


# ----------------------------------------------------------------------------------------------------------- writing


def write_two(folder):
    (folder / "a").write_text("one")
    (folder / "b").write_text("two")


def test_published_checkpoint_is_whole_and_says_what_it_is(tmp_path):
    publish(tmp_path / "checkpoint-3", write_two, {"step": 3})
    assert problem_with(tmp_path / "checkpoint-3") == ""
    manifest = read_manifest(tmp_path / "checkpoint-3")
    assert manifest["step"] == 3 and set(manifest["files"]) == {"a", "b"} and manifest["files"]["a"]["size"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_failed_writing_leaves_what_was_there(tmp_path, monkeypatch, call):
    folder = make_checkpoint(tmp_path, 5)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        publish(folder, write_two, {})
    monkeypatch.undo()
    assert problem_with(folder) == ""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_disk_full_between_the_two_renames_puts_the_old_one_back(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path, 5)
    rename, calls = os.rename, []

    def fail_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(*args)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OSError, match="No space left"):
        publish(folder, write_two, {})
    assert problem_with(folder) == "" and (folder / ADAPTER_FILE).is_file()


def test_leftovers_of_a_killed_writer_are_removed_and_never_taken(tmp_path):
    folder = make_checkpoint(tmp_path, 5)
    shutil.copytree(folder, tmp_path / ".checkpoint-9.77.partial")
    shutil.copytree(folder, tmp_path / ".checkpoint-8.77.old")
    assert find_checkpoint("auto", tmp_path) == str(folder)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_writer_works_beside_the_run_and_survives_failures(caplog):
    writer, done = CheckpointWriter(), []

    def slow():
        time.sleep(0.3)
        done.append("slow")

    def fail():
        raise OSError(28, "No space left on device")

    writer.submit(slow, "checkpoint-1")
    assert done == []
    writer.submit(fail, "checkpoint-2")
    assert done == ["slow"], "one at a time"
    writer.wait()
    assert "checkpoint-2 was not written: [Errno 28] No space left on device" in caplog.text
    assert isinstance(writer.last_error, OSError)
    writer.submit(lambda: done.append("again"), "checkpoint-3")
    writer.wait()
    assert done == ["slow", "again"] and writer.last_error is None


# ------------------------------------------------------------------------------------------------------------ choosing


def test_resume_of_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no such folder"):
        find_checkpoint(str(tmp_path / "checkpoint-1"), tmp_path)


def test_auto_takes_the_newest_complete_one(tmp_path):
    for step in (9, 10, 100, 200):
        make_checkpoint(tmp_path, step)
    remove_adapter(tmp_path / "checkpoint-200")
    cut_adapter(tmp_path / "checkpoint-100")
    (tmp_path / "checkpoint-x").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (9, 10, 100, 200)]
    assert find_checkpoint("auto", tmp_path) == str(tmp_path / "checkpoint-10")


def test_auto_without_checkpoints_starts_anew(tmp_path):
    assert find_checkpoint("auto", tmp_path / "nowhere") is None
    assert find_checkpoint(None, tmp_path) is None


def test_earlier_run_is_not_trained_over(tmp_path):
    folder = make_checkpoint(tmp_path, 5)
    with pytest.raises(RecipeError, match=r"^training\.output_dir: .* holds checkpoint-5 of an earlier run"):
        check_output_dir(tmp_path, None, overwrite=False)
    assert problem_with(folder) == ""
    check_output_dir(tmp_path, str(folder), overwrite=True)
    assert problem_with(folder) == ""


def test_overwrite_clears_an_earlier_run_and_nothing_else(tmp_path):
    make_checkpoint(tmp_path, 5)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "notes.txt").touch()
    check_output_dir(tmp_path, None, overwrite=True)
    assert (tmp_path / "checkpoint-5").exists()
    clear_output_dir(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_goes_on_where_only_an_unfinished_checkpoint_lies(tmp_path):
    """A job that was stopped while it wrote its first checkpoint must be able to start again with the same command."""
    remove_adapter(make_checkpoint(tmp_path, 5))
    assert find_checkpoint("auto", tmp_path) is None
    check_output_dir(tmp_path, None, overwrite=False, resume=True)
    assert (tmp_path / "checkpoint-5").exists()


def test_output_dir_must_be_a_folder_that_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RecipeError, match=r"^training\.output_dir: .*file is a file, not a folder"):
            find_checkpoint(None, output)
    with pytest.raises(RecipeError, match=r"^training\.output_dir: cannot make /proc/nowhere"):
        check_output_dir("/proc/nowhere/run", None, overwrite=False)


def test_unwritable_output_dir_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # as root every folder is writable
    with pytest.raises(RecipeError, match="is not writable"):
        check_output_dir(tmp_path, None, overwrite=False)
