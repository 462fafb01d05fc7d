"""`alignzoo` and `python -m alignzoo`."""

from __future__ import annotations

from alignzoo.cli import cli


def main() -> None:
    cli(prog_name="alignzoo")


if __name__ == "__main__":
    main()
