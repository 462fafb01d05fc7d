"""A process that compares answers by math-verify: it reads lines of JSON and writes one for each.

math-verify keeps its time limit by a signal, which only the main thread of a process gets, and a number such as
9^9^9^9 keeps Python busy where no signal reaches it. So it works in a process that can be ended.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def _gold(answer: str) -> list[Any]:
    """math-verify finds LaTeX between dollars only, and of bare LaTeX such as 3\\pi it reads the number alone."""
    from math_verify import parse

    bare = "" if "$" in answer else f"${answer}$"
    found: list[Any] = (parse(bare) if bare and "\\" in answer else parse(answer)) or parse(bare)
    return found


def main() -> None:
    from math_verify import parse, verify

    for line in sys.stdin:
        asked = json.loads(line)
        gold = _gold(asked["answer"])
        value = float(verify(gold, parse(asked["completion"]))) if gold else None
        sys.stdout.write(json.dumps({"value": value}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
