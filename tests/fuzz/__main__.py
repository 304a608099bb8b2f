"""Every fuzzer, or those named, for as long as is asked for: a table, and status 1 if anything was found."""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

from . import FUZZERS, attack


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="FUZZER", help=f"of {', '.join(FUZZERS)}; default: all")
    parser.add_argument("--seconds", type=float, default=300.0, help="time for all of them together (default: 300)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9), help="default: another one each time")
    parser.add_argument("--inputs", type=int, default=2**31, help="at most so many for each")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where inputs that do harm are put")
    args = parser.parse_args()
    names = args.names or list(FUZZERS)
    if unknown := {name for name in names if ":" not in name} - set(FUZZERS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(FUZZERS)}")
    print(f"seed {args.seed}; {args.seconds:g} s for {len(names)} fuzzers\n")
    print(f"{'fuzzer':16} {'inputs':>9} {'refused':>9} {'seconds':>8} {'MB':>6} {'findings':>8}", flush=True)
    found, total = [], 0
    for name in names:
        outcome = attack(
            name, args.seed, inputs=args.inputs, seconds=args.seconds / len(names), first=args.first, keep=args.keep
        )
        print(
            f"{name.rpartition(':')[2]:16} {outcome.inputs:9,} {outcome.refused:9,} {outcome.seconds:8.1f} "
            f"{outcome.megabytes:6.0f} {len(outcome.findings):8}",
            flush=True,
        )
        found += [(name, finding) for finding in outcome.findings]
        total += outcome.inputs
    for name, finding in found:
        print(f"\n{name}, input {finding.index}, kept as {finding.kept}:\n{finding.what.rstrip()}")
    print(f"\n{total:,} inputs, {len(found)} findings (seed {args.seed})")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
