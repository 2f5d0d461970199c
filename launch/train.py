"""Train from a recipe: deepspeed launch/train.py --config launch/recipes/quickstart.yaml (see --help)."""

import sys

from fvae_dist.cli import train_command

if __name__ == "__main__":
    sys.exit(train_command())
