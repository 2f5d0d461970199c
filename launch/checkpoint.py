"""Look at a run's checkpoints: python launch/checkpoint.py --help."""

import sys

from fvae_dist.cli import checkpoint_command

if __name__ == "__main__":
    sys.exit(checkpoint_command())
