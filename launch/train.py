"""Train from a recipe: deepspeed launch/train.py --config launch/recipes/quickstart.yaml (see --help)."""

from fvae_dist.cli import leave, train_command

if __name__ == "__main__":
    leave(train_command())
