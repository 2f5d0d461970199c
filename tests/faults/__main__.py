"""Every fault, in runs of two ranks under ZeRO-3, and the table of docs/faults.md: python -m tests.faults."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.faults import all_faults
from tests.faults.harness import SAVE_STEPS, Place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="how many SIGKILLs")
    parser.add_argument("--seed", type=int, default=0, help="of their moments")
    parser.add_argument("--ranks", type=int, default=2, help="1: without DeepSpeed")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    args = parser.parse_args()
    rows, are_good = [], True
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), args.ranks)
        for name, inject in all_faults(args.kills, args.seed).items():
            if args.only not in name:
                continue
            start = time.monotonic()
            outcome = inject(place)
            print(f"{name}: {outcome} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
            are_good &= outcome.is_good
            rows.append(
                f"| {name} | {outcome.injected} | {outcome.right} of {outcome.runs} | {outcome.lost} | "
                f"{outcome.lost_checkpoints} | {outcome.wrong} | {outcome.told} |"
            )
    print(
        "| fault | injected | runs that ended right | steps done again, at most | checkpoints lost | wrong results | |"
    )
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\nA checkpoint every {SAVE_STEPS} steps, with SIGKILL every step.")
    return 0 if are_good else 1


if __name__ == "__main__":
    sys.exit(main())
