"""The columns of the recipe: data.columns and data.keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignzoo.data.rows import BadRow
from alignzoo.data.values import short, value
from alignzoo.errors import DataError
from alignzoo.schema import nearest

FLOAT32_MAX = 3.4028234e38


def listed(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
    return ", ".join(columns[:20]) + more if columns else "(none)"


def rename(row: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The row under our names: ours = theirs. A column that was renamed is gone under its old name."""
    theirs = set(mapping.values())
    kept = {key: value for key, value in row.items() if key not in theirs}
    return {**kept, **{ours: row[name] for ours, name in mapping.items() if name in row}}


def check_mapping(found: Sequence[str], mapping: Mapping[str, str], source: str) -> None:
    """Raises DataError where data.columns names a column that the file does not have."""
    for ours, theirs in mapping.items():
        if theirs not in found:
            raise DataError(
                f'{source}: data.columns maps {ours} = "{theirs}", and there is no column "{theirs}"'
                f"{nearest(theirs, found)}",
                why=f"columns found: {listed(found)}",
            )


def check_keep(found: Sequence[str], keep: Sequence[str], source: str) -> None:
    """Raises DataError where no row has a column of data.keep."""
    for column in keep:
        if column not in found:
            raise DataError(
                f'{source}: data.keep names "{column}", and there is no such column{nearest(column, found)}',
                why=f"columns found: {listed(found)}",
            )


def numbers(row: Mapping[str, Any], keep: Sequence[str]) -> dict[str, float]:
    """The columns of data.keep. true and false count as 1 and 0; numbers may be written as text, as in CSV."""
    return {column: _number(value(row, column), column) for column in keep}


def _number(found: Any, column: str) -> float:
    try:
        number = float(found) if isinstance(found, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= FLOAT32_MAX:  # also refuses nan
        raise BadRow("keep-not-a-number", f'column "{column}" is {short(found)}, not a finite number of 32 bits')
    return number
