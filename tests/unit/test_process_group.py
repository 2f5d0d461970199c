"""How the process group ends: in order where all ranks end, at once where one may be alone."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from fvae_dist.training.process_group import ended_with, free_port


@pytest.fixture
def group():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("error", [None, ValueError, MemoryError])
def test_group_ends_unless_a_rank_of_nccl_may_be_alone(group, monkeypatch, backend, error):
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    try:
        with ended_with(ValueError):
            if error:
                raise error("of the run")
        assert error is None
    except (ValueError, MemoryError) as found:
        assert type(found) is error and str(found) == "of the run"
    assert dist.is_initialized() == (backend == "nccl" and error is MemoryError)


def test_no_group_is_no_problem():
    with pytest.raises(MemoryError), ended_with(ValueError):
        raise MemoryError
    with ended_with():
        pass
