"""The real command, disturbed: nothing may be lost or wrong. All faults on two ranks: python -m tests.faults."""

import os
import shutil
import signal

import pytest

from fvae_dist.training.checkpoints import list_checkpoints
from fvae_dist.training.control import EXIT_RESUME
from tests.faults import faults
from tests.faults.elastic import resumed_in
from tests.faults.harness import TOKEN, Layout, Place, send

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """On one rank, without DeepSpeed; the undisturbed run is done."""
    place = Place(tmp_path_factory.mktemp("faults"))
    place.undisturbed()
    return place


def test_signal_stops_with_75_and_the_run_goes_on_bit_for_bit(place):
    outcome = faults.signalled(place, signal.SIGUSR1)  # SIGTERM: tests/e2e/test_slurm.py
    assert outcome.is_good and outcome.lost == 0
    steps = [int(folder.name.rpartition("-")[2]) for folder in list_checkpoints(place.folder / "SIGUSR1")]
    assert set(steps) > {3, 6, 9, 12}  # and that of the signal


def test_stopped_run_has_no_adapter_yet(place):
    output = place.folder / "stopped"
    run = place.start(output)
    run.wait_for("step 1/")
    send(run, signal.SIGUSR1)
    assert run.finish() == [EXIT_RESUME]
    assert not (output / "adapter").exists()


def test_killed_at_random_moments_it_still_ends_right(place):
    outcome = faults.killed(place, num_kills=2, seed=7)
    assert outcome.is_good and outcome.lost <= 2  # a checkpoint every step, written while the next one runs


def test_hang_ends_the_run_which_goes_on_from_its_checkpoint(place):
    outcome = faults.hangs(place)
    assert outcome.is_good and outcome.lost <= 3


def test_what_is_not_a_number_ends_the_run_which_goes_on_from_its_checkpoint(place):
    outcome = faults.not_a_number(place)
    assert outcome.is_good and outcome.lost <= 3


def test_run_outlives_jumps_of_the_clock_and_the_loss_of_its_logs(place):
    fault = f"clock 0 {faults.STEP}; no_logs 0 {faults.STEP}"
    outcome = faults.survived(place, fault, "logging.tensorboard=true", says="tensorboard: not written")
    assert outcome.is_good


@pytest.mark.skipif(
    shutil.which("mount") is None or os.geteuid() != 0, reason="only root may mount a small file system"
)
def test_full_disk_costs_one_checkpoint(place):
    try:
        outcome = faults.disk_full(place)
    except faults.NoSmallDisk as error:
        pytest.skip(str(error))
    assert outcome.is_good


def test_damage_anywhere_in_a_checkpoint_is_found(place):
    assert faults.damaged(place, region_bytes=1024).is_good


def test_damaged_record_is_named_and_the_run_goes_on_once_it_is_mended(place):
    assert faults.bad_record(place).is_good


def test_second_run_on_the_folder_is_refused(place):
    assert faults.second_run(place).is_good


def test_packed_run_goes_on_bit_for_bit(tmp_path):
    """From step 9, in mid-epoch: an epoch has 5 packs, a step 4 and 1."""
    place = Place(tmp_path)
    settings = ("data.packing=true", "data.max_length=512")
    place.complete(tmp_path / "whole", *settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-9", tmp_path / "resumed" / "checkpoint-9")
    assert place.complete(tmp_path / "resumed", *settings, resume=True).resumed_at == 9
    assert place.is_right(tmp_path / "resumed")


@pytest.fixture(scope="module")
def place_of_two(tmp_path_factory) -> Place:
    """On two ranks, under ZeRO-3."""
    return Place(tmp_path_factory.mktemp("two"), Layout(num_ranks=2, deepspeed="zero3"))


@pytest.mark.parametrize("sequence_parallel", [1, 2, 4])
def test_two_ranks_go_on_as_four(place_of_two, sequence_parallel):
    """And with half the accumulation; as two groups that share their rows; as one, whose four ranks share two key-value
    heads. 1 to 2 and 2 to 1: tests/distributed/test_two_ranks.py."""
    four = Layout(num_ranks=4, accumulation=1, deepspeed="zero3", sequence_parallel=sequence_parallel)
    output = place_of_two.folder / f"shared_by_{sequence_parallel}"
    assert resumed_in(place_of_two, four, output) < 1e-5


def test_shared_rows_go_on_unshared(place_of_two):
    shared = Layout(num_ranks=2, accumulation=1, deepspeed="zero2", sequence_parallel=2)
    output = place_of_two.folder / "shared"
    place_of_two.complete(output, layout=shared)
    assert place_of_two.difference(output) < 1e-5
    shutil.copytree(output / "checkpoint-6", place_of_two.folder / "unshared" / "checkpoint-6")
    run = place_of_two.complete(place_of_two.folder / "unshared", resume=True)
    assert run.resumed_at == 6 and place_of_two.difference(place_of_two.folder / "unshared") < 1e-5


def test_token_of_the_user_is_written_nowhere(place):
    """Every rank had it in HF_TOKEN."""
    files = [path for path in place.folder.rglob("*") if path.is_file()]
    assert (
        sum(path.name == "manifest.json" for path in files) >= 4 and sum(path.suffix == ".log" for path in files) >= 1
    )
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
