"""`python -m tests.chat.fuzz --cases 100000 [--seed 0]`: the parser's laws over generated outputs.

Every case has its own seed, so that a failure names the one number that repeats it.
"""

from __future__ import annotations

import argparse
from random import Random

from . import laws


def run(cases: int, seed: int = 0) -> None:
    """Check `cases` cases; raises AssertionError naming the seed of the first that fails."""
    for case in range(seed, seed + cases):
        try:
            laws.check(Random(case))
        except Exception as error:
            raise AssertionError(f"case {case}: --cases 1 --seed {case}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    run(arguments.cases, arguments.seed)
    print(f"{arguments.cases} cases hold, from seed {arguments.seed}")


if __name__ == "__main__":
    main()
