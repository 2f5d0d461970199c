"""Which checkpoint a run resumes from, and what it refuses to train over."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fvae_dist.training.checkpoints import (
    check_output_dir,
    clear_output_dir,
    find_checkpoint,
    list_checkpoints,
    what_is_missing,
)
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.saving import ADAPTER_FILE


def make_checkpoint(output, step, deepspeed=False):
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, folder / ADAPTER_FILE)
    if deepspeed:
        shards = folder / f"global_step{step}"
        shards.mkdir()
        (shards / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
        (folder / "latest").write_text(shards.name)
    else:
        (folder / "optimizer.pt").touch()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def break_state(folder):
    (folder / "trainer_state.json").write_text("{")


def break_state_as_list(folder):
    (folder / "trainer_state.json").write_text("[]")


def remove_adapter(folder):
    (folder / ADAPTER_FILE).unlink()


def cut_adapter(folder):
    (folder / ADAPTER_FILE).write_bytes((folder / ADAPTER_FILE).read_bytes()[:10])


def empty_adapter(folder):
    save_file({}, folder / ADAPTER_FILE)


def remove_optimizer(folder):
    for path in (folder / "optimizer.pt", *folder.glob("global_step*/*optim_states.pt")):
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("deepspeed", [False, True])
@pytest.mark.parametrize(
    ("damage", "missing"),
    [
        (break_state, "trainer_state.json"),
        (break_state_as_list, "trainer_state.json"),
        (remove_adapter, ADAPTER_FILE),
        (cut_adapter, ADAPTER_FILE),
        (empty_adapter, ADAPTER_FILE),
        (remove_optimizer, "the optimizer's"),
    ],
)
def test_incomplete_checkpoint_names_what_is_missing(tmp_path, deepspeed, damage, missing):
    folder = make_checkpoint(tmp_path, 5, deepspeed)
    assert what_is_missing(folder) == ""
    assert find_checkpoint(str(folder), tmp_path) == str(folder)
    damage(folder)
    with pytest.raises(RecipeError, match=r"^--resume .*checkpoint-5: not a complete checkpoint: ") as caught:
        find_checkpoint(str(folder), tmp_path)
    assert missing in str(caught.value)


@pytest.mark.parametrize("tag", [b"", b"\xff\xfe", b"global_step99"])
def test_deepspeed_tag_must_name_a_folder_with_shards(tmp_path, tag):
    folder = make_checkpoint(tmp_path, 5, deepspeed=True)
    (folder / "latest").write_bytes(tag)
    assert what_is_missing(folder) == "the optimizer's shards are missing"


def test_resume_of_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no such folder"):
        find_checkpoint(str(tmp_path / "checkpoint-1"), tmp_path)


def test_auto_takes_the_newest_complete_one(tmp_path):
    for step in (9, 10, 100, 200):
        make_checkpoint(tmp_path, step)
    remove_adapter(tmp_path / "checkpoint-200")
    remove_optimizer(tmp_path / "checkpoint-100")
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
    assert what_is_missing(folder) == ""
    check_output_dir(tmp_path, str(folder), overwrite=True)
    assert what_is_missing(folder) == ""


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
