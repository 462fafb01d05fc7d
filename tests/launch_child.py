"""A rank for the tests of launch.py: `python launch_child.py run MODE FOLDER` behaves as MODE. It imports no torch."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import click

from alignzoo.cli import Group
from alignzoo.errors import AlignzooError, RunError
from alignzoo.ranks import Rank, another_rank_failed, quiet_unless_first


@click.group(cls=Group)
@click.option("--local_rank", type=int, default=None)
def cli(local_rank: int | None) -> None:
    """A rank."""


def wait(seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.02)


def echo_after(seconds: float) -> None:
    """What gloo raises when the other rank has gone."""
    time.sleep(seconds)
    raise RuntimeError("[pair.cc:554] Connection closed by peer [127.0.0.1]:36034")


def alike(rank: int, folder: Path) -> None:
    raise AlignzooError("the recipe has a mistake", fix="mend it")


def second(rank: int, folder: Path) -> None:
    if rank == 1:
        raise RunError("step 3: the loss is not finite", why="it is nan")
    wait()


def bug(rank: int, folder: Path) -> None:
    if rank == 1:
        raise ZeroDivisionError("a bug")
    echo_after(0.05)


def killed(rank: int, folder: Path) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    echo_after(0.05)


def silent(rank: int, folder: Path) -> None:
    if rank == 1:
        os._exit(7)
    wait()


def saving(rank: int, folder: Path, seconds: float = 1.0) -> None:
    """Notes each signal, saves for a second, ends well."""
    got: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        got.append(number)
        with (folder / f"signals-{rank}").open("a") as file:
            file.write(f"{number}\n")

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    (folder / f"ready-{rank}").write_text(str(os.getpid()))
    while not got:
        time.sleep(0.02)
    time.sleep(seconds if rank == 0 else 0.2)
    (folder / f"saved-{rank}").touch()


def slow(rank: int, folder: Path) -> None:
    saving(rank, folder, 60)


def interrupted(rank: int, folder: Path) -> None:
    (folder / f"ready-{rank}").write_text(str(os.getpid()))
    wait()


def deaf(rank: int, folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    interrupted(rank, folder)


def stubborn(rank: int, folder: Path) -> None:
    if rank == 1:
        while not (folder / "ready-0").exists():
            time.sleep(0.02)
        raise RunError("the disk is full")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "ready-0").touch()
    wait()


def knows(rank: int, folder: Path) -> None:
    if rank == 1:
        while not (folder / "ready-0").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "ready-0").touch()
    while not another_rank_failed():
        time.sleep(0.02)
    (folder / "known").touch()
    echo_after(0)


def well(rank: int, folder: Path) -> None:
    here = Rank.here()
    (folder / f"rank-{here.rank}").write_text(
        f"{here.local} {here.world} {os.environ['OMP_NUM_THREADS']} {sys.argv[3:]}"
    )


MODES = {
    f.__name__: f for f in (alike, second, bug, killed, silent, saving, slow, interrupted, deaf, stubborn, knows, well)
}


@cli.command()
@click.argument("mode")
@click.argument("folder", type=Path)
@click.argument("rest", nargs=-1)
def run(mode: str, folder: Path, rest: tuple[str, ...]) -> None:
    """Behave as MODE."""
    quiet_unless_first()
    MODES[mode](Rank.here().rank, folder)


if __name__ == "__main__":
    cli()
