"""Every fault, in runs of two ranks under ZeRO-3, or resuming in other layouts; the tables of docs/faults.md."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.elastic import matrix
from tests.faults.faults import all_faults
from tests.faults.harness import SAVE_STEPS, Layout, Place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="how many SIGKILLs")
    parser.add_argument("--seed", type=int, default=0, help="of their moments")
    parser.add_argument("--ranks", type=int, default=2, choices=[1, 2], help="1: without DeepSpeed")
    parser.add_argument("--elastic", action="store_true", help="no faults: go on in other layouts, from each to each")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    args = parser.parse_args()
    rows, are_good = [], True
    with tempfile.TemporaryDirectory() as folder:
        if args.elastic:
            print("\n".join(matrix(Path(folder))))
            return 0
        place = Place(Path(folder), Layout(2, deepspeed="zero3") if args.ranks == 2 else Layout())
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
    header = ("fault", "injected", "ended right", "steps done again, at most", "checkpoints lost", "wrong results")
    print(f"| {' | '.join(header)} | what happens |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\nA checkpoint every {SAVE_STEPS} steps, with SIGKILL every step.")
    return 0 if are_good else 1


if __name__ == "__main__":
    sys.exit(main())
