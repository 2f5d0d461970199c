"""How many optimizer steps a run takes, before there is a trainer."""

from __future__ import annotations

import math

from fvae_dist.training.recipe import TrainingSection


def num_readers(training: TrainingSection, world_size: int) -> int:
    """Devices, or groups of devices that share their rows, which read rows of their own."""
    return world_size // training.sequence_parallel


def global_batch_size(training: TrainingSection, world_size: int) -> int:
    """Sequences of one optimizer step."""
    per_reader = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return per_reader * num_readers(training, world_size)


def steps_per_epoch(training: TrainingSection, num_sequences: int, world_size: int) -> int:
    return math.ceil(num_sequences / global_batch_size(training, world_size))


def optimizer_steps(training: TrainingSection, num_sequences: int, world_size: int) -> int:
    """As the trainer counts them: the last batch of an epoch may be a part of one, and so may the last epoch."""
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(steps_per_epoch(training, num_sequences, world_size) * training.num_train_epochs)
