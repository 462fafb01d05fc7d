"""The hooks that a plugin may implement. It imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from alignzoo.api import Callback, Format, Loss, Reward

PROJECT = "alignzoo"
F = TypeVar("F", bound=Callable[..., Any])

hookspec = pluggy.HookspecMarker(PROJECT)
_hookimpl = pluggy.HookimplMarker(PROJECT)


def hookimpl(function: F) -> F:
    """Marks a function of a plugin as the implementation of the hook of the same name."""
    return _hookimpl(function)


@hookspec
def alignzoo_losses() -> list[type[Loss]]:
    """The losses that the plugin brings: classes, not instances. Called once, when the plugin is loaded."""
    return []


@hookspec
def alignzoo_rewards() -> list[type[Reward] | Callable[..., Any]]:
    """The rewards that the plugin brings: classes or plain functions. Called once, when the plugin is loaded."""
    return []


@hookspec
def alignzoo_formats() -> list[Format]:
    """The formats of rows that the plugin brings: alignzoo.Format(...). Called once, when the plugin is loaded."""
    return []


@hookspec
def alignzoo_callbacks() -> list[type[Callback]]:
    """The callbacks that the plugin brings: classes, not instances. Called once, when the plugin is loaded."""
    return []
