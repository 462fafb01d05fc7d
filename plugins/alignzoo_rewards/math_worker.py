"""A process that compares answers by math-verify: it reads lines of JSON and writes one for each.

math-verify keeps its time limit by a signal, which only the main thread of a process gets, and a number such as
9^9^9^9 keeps Python busy where no signal reaches it. So it works in a process that can be ended.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from math_verify import parse, verify

    for line in sys.stdin:
        asked = json.loads(line)
        gold = parse(asked["answer"])
        value = float(verify(gold, parse(asked["completion"]))) if gold else None
        sys.stdout.write(json.dumps({"value": value}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
