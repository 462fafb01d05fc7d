"""The token tree: a prompt with its completions, what every kind of data becomes. It imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
LogPs = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Completion:
    """Tokens that follow a prompt, its end of turn among them."""

    ids: Ids  # (n,), n >= 1
    mask: Mask | None = None  # (n,) True at the tokens that count, at least one; None: all of them
    old: LogPs | None = None  # (n,) of the policy that sampled it, by the training forward; None: the policy as it is
    sampler: LogPs | None = None  # (n,) as the sampler computed them

    @property
    def counted(self) -> int:
        """Tokens that count for the loss."""
        return len(self.ids) if self.mask is None else int(self.mask.sum())


@dataclass(frozen=True, eq=False)
class Tree:
    """One example. pairs: completions are (chosen, rejected); demonstrations and labelled have one; groups have G.

    A prompt that is still to be answered has none.
    """

    row: int  # its place in the data set, 0-based, after bad rows were left out
    prompt: Ids  # (P,), P >= 0
    completions: tuple[Completion, ...]
    where: str = ""  # "file:line", for messages
    label: bool | None = None  # labelled
    rewards: tuple[float, ...] | None = None  # groups, one per completion; NaN where no reward applies
    truncated: tuple[bool, ...] | None = None  # groups
    extra: Mapping[str, float] = field(default_factory=dict)  # the columns of data.keep
    mismatched: Completion | None = None  # with needs_mismatched: the completion of another prompt
    asked: Any = ""  # prompts: text, or messages
    columns: Mapping[str, Any] = field(default_factory=dict)  # prompts: the other columns of the row, for rewards

    @property
    def branches(self) -> tuple[Completion, ...]:
        """All completions that may be forwarded, the mismatched one last."""
        return self.completions if self.mismatched is None else (*self.completions, self.mismatched)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, counted once, and of all completions."""
        return len(self.prompt) + sum(len(c.ids) for c in self.completions)
