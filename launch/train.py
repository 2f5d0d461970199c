"""Train from a recipe: deepspeed launch/train.py --config launch/recipes/quickstart.yaml (see --help)."""

from fvae_dist.cli import train_command
from fvae_dist.training.leaving import leave

if __name__ == "__main__":
    leave(train_command())
