"""Convert an adapter of the reference code, or export one of ours: python launch/export.py --help."""

import sys

from fvae_dist.cli import export_command

if __name__ == "__main__":
    sys.exit(export_command())
