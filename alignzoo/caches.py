"""`alignzoo cache`: what is kept between runs, looked at, checked and removed."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignzoo.data.cache import base_folder, damage_of, kept_data, prune_data, remove_data, size_limit
from alignzoo.errors import AlignzooError
from alignzoo.progress import Say
from alignzoo.refstore import kept_references, prune, remove_reference, verify_reference

KINDS = ("reference", "data")


def entries() -> list[dict[str, Any]]:
    """What is kept, as plain values: log-probs of references, then prepared data, the last used first."""
    rows: list[dict[str, Any]] = []
    for kept in kept_references():
        about = {"what": kept.words, "numerics": kept.numerics, "damage": kept.damage}
        rows.append(_entry("reference", kept.path, kept.rows, kept.size, kept.used) | about)
    for entry in kept_data():
        about = {"what": "prepared rows", "numerics": {}, "damage": ""}
        rows.append(_entry("data", entry.path, entry.rows, entry.size, entry.used) | about)
    return rows


def _entry(kind: str, path: Path, rows: int, size: int, used: float) -> dict[str, Any]:
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
    return {"kind": kind, "name": path.stem, "path": str(path), "rows": rows, "bytes": size, "used": day}


def print_entries(rows: list[dict[str, Any]]) -> None:
    """A table, and the sum."""
    console = Console()
    table = Table()
    for column, side in (("kind", "left"), ("name", "left"), ("rows", "right"), ("MB", "right"), ("last used", "left"),
                         ("of", "left")):  # fmt: skip
        table.add_column(column, overflow="fold", justify=side)  # type: ignore[arg-type]
    for row in rows:
        numerics = " ".join(str(row["numerics"][key]) for key in ("dtype", "precision", "device") if row["numerics"])
        what = f"damaged: {row['damage']}" if row["damage"] else f"{row['what']} {numerics}".strip()
        cells = (row["kind"], row["name"][:10], f"{row['rows']:,}", f"{row['bytes'] / 1e6:.1f}", row["used"], what)
        table.add_row(*map(Text, cells))
    console.print(table)
    total = sum(row["bytes"] for row in rows)
    console.print(f"{len(rows)} entries, {total / 1e6:.1f} MB in {base_folder()}", highlight=False, soft_wrap=True)


def verify(say: Say) -> None:
    """Reads all that is kept. What is damaged is removed: it is made again when it is wanted.

    Raises AlignzooError where something was.
    """
    bad = 0
    for kept in kept_references():
        try:
            good, removed = verify_reference(kept.path)
        except (sqlite3.Error, OSError) as error:
            gone = "removed" if remove_reference(kept.path) else "in use, not removed"
            say(f"{kept.path}: damaged ({error}): {gone}")
            bad += 1
            continue
        bad += bool(removed)
        say(f"{kept.path}: {good} rows are whole" + (f", {removed} were not and are removed" if removed else ""))
    for entry in kept_data():
        damage = damage_of(entry.path)
        if damage:
            remove_data(entry.path)
            bad += 1
        say(f"{entry.path}: " + (f"damaged ({damage}): removed" if damage else f"{entry.rows} rows are whole"))
    if bad:
        raise AlignzooError(
            f"{bad} entries of the cache were damaged", fix="nothing: what was removed is made again when it is wanted"
        )


def collect(gigabytes: float | None, say: Say) -> None:
    """Removes what was not used for the longest time, of each kind, beyond ALIGNZOO_CACHE_GB or so many gigabytes."""
    limit = size_limit() if gigabytes is None else gigabytes * 1e9
    prune(limit, say)
    prune_data(limit, say)
    rows = entries()
    say(f"{len(rows)} entries stay, {sum(row['bytes'] for row in rows) / 1e6:.1f} MB")


def clear(kind: str | None, say: Say) -> None:
    """Removes all that is kept, or one kind of it; not log-probs that a run reads or writes right now."""
    size = count = 0
    for row in entries():
        if kind not in (None, row["kind"]):
            continue
        path = Path(row["path"])
        if row["kind"] == "data":
            remove_data(path)
        elif not remove_reference(path):
            say(f"a run uses {path}: it stays")
            continue
        size, count = size + row["bytes"], count + 1
    say(f"removed {count} entries, {size / 1e6:.1f} MB")
