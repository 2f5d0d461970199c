"""Plan a recipe's memory, traffic and time on a cluster: python launch/plan.py --help."""

import sys

from fvae_dist.cli import plan_command

if __name__ == "__main__":
    sys.exit(plan_command())
