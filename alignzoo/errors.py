"""Errors that a person can act on: what happened, why, and the way out."""

from __future__ import annotations


class AlignzooError(Exception):
    """A mistake that the user can mend. The command line prints it without a traceback and exits with `exit_code`.

    what: one sentence that names the thing (file and line, row, setting, plugin).
    why:  the cause, where it is not plain from `what`.
    fix:  what to do.
    """

    exit_code = 2
    on_all_ranks = False  # every rank raises it alike, so that the first one tells it

    def __init__(self, what: str, *, why: str = "", fix: str = "", on_all_ranks: bool = False) -> None:
        self.on_all_ranks = on_all_ranks
        self.what, self.why, self.fix = what, why, fix
        lines = [what]
        if why:
            lines.append(f"  why: {why}")
        if fix:
            lines.append(f"  way out: {fix}")
        super().__init__("\n".join(lines))


class RecipeError(AlignzooError):
    """The recipe, or an override of it, does not say what can be run."""


class DataError(AlignzooError):
    """A data file, or a row of it, cannot be used."""


class PluginError(AlignzooError):
    """A loss plugin is missing, broken, or breaks the contract."""


class ModelError(AlignzooError):
    """A model or tokenizer cannot be found, loaded or used."""


class RunError(AlignzooError):
    """A run stopped for a reason that lies in its numbers, not in the user's words."""

    exit_code = 1
