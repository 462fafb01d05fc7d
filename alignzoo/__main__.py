"""`alignzoo` and `python -m alignzoo`."""

from __future__ import annotations

import os
import sys

from alignzoo.cli import cli
from alignzoo.ranks import end_in_time


def main() -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars in a file are one endless line; ours become lines
    try:
        cli(prog_name="alignzoo")
    except SystemExit as end:
        if end.code:
            end_in_time()
        raise


if __name__ == "__main__":
    main()
