"""Compare PEFT methods: python launch/compare.py --help."""

import sys

from fvae_dist.cli import compare_command

if __name__ == "__main__":
    sys.exit(compare_command())
