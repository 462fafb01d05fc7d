"""Tables of a recipe that name plugins, [[rewards]] and [[callbacks]], as what they name. It imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from alignzoo.errors import PluginError, RecipeError
from alignzoo.plugin_kinds import Info
from alignzoo.plugins import Registry, make
from alignzoo.recipe import CallbackChoice, Recipe, RewardChoice, problems_error
from alignzoo.schema import Problem, show

I = TypeVar("I", bound=Info)  # noqa: E741
C = TypeVar("C", bound=RewardChoice | CallbackChoice)


@dataclass(frozen=True)
class Chosen(Generic[I, C]):
    """One table, and what was made of it."""

    label: str  # its name; of several with one name, the later ones are name_2, name_3
    choice: C
    info: I
    thing: Any

    @property
    def owner(self) -> str:
        return f"{self.info.distribution} {self.info.version}".strip()

    @property
    def settings(self) -> str:
        found = dataclasses.asdict(self.thing.settings)
        return ", ".join(f"{k} = {show(v)}" for k, v in found.items()) or "no settings"


def make_chosen(recipe: Recipe, registry: Registry, kind: type[I], choices: Sequence[C]) -> list[Chosen[I, C]]:
    """What some tables name, with their settings. Raises RecipeError that names the place."""
    made: list[Chosen[I, C]] = []
    problems: list[Problem] = []
    for choice in choices:
        try:
            info = registry.one(kind, choice.name)
        except PluginError as error:
            place = recipe.tables.locate((*choice.path, "name"))
            raise RecipeError(f"{place}: {error.what}", why=error.why, fix=error.fix) from error
        thing = make(info, choice.settings, problems, choice.path)
        if thing is not None:
            same = sum(one.choice.name == choice.name for one in made)
            made.append(Chosen(f"{choice.name}_{same + 1}" if same else choice.name, choice, info, thing))
    if problems:
        raise problems_error(recipe.tables, problems)
    return made
