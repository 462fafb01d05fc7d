"""`alignzoo` and `python -m alignzoo`."""

from __future__ import annotations

from alignzoo.cli import cli
from alignzoo.ranks import end_in_time


def main() -> None:
    try:
        cli(prog_name="alignzoo")
    except SystemExit as end:
        if end.code:
            end_in_time()
        raise


if __name__ == "__main__":
    main()
