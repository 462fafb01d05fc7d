"""The kinds of things that a plugin may bring, each with its hook and its contract. It imports no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

from alignzoo.api import Callback, Format, Loss, Reward
from alignzoo.declared import check_loss_class
from alignzoo.declared_others import callback_class, checked_format
from alignzoo.declared_rewards import reward_class
from alignzoo.plugin_errors import own_files


@dataclass(frozen=True)
class Info:
    """A thing and who brought it."""

    kind: ClassVar[str]
    kinds: ClassVar[str]  # the key of `alignzoo plugins --json`
    hook: ClassVar[str]

    cls: Any  # a class, but of a format the Format itself: it has no settings that it could be made from
    name: str
    distribution: str  # "file" for --plugin, "python" for a class given from Python
    version: str  # of the distribution; "sha256:..." of a file; "" where there is none
    label: str  # the entry point's name; a file's stem
    origin: str  # the module that the entry point names; a file's absolute path; a class's module and name

    @property
    def owner(self) -> str:
        """The plugin in words, for errors."""
        return f"{self.distribution} {self.version}".strip() + f' ("{self.label}", {self.origin})'

    def source_hash(self) -> str:
        """sha256 of the plugin's Python files: of its package, module or file."""
        digest = hashlib.sha256()
        for root in own_files(self.origin, self.distribution != "file"):
            for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    @staticmethod
    def checked(thing: Any) -> Any:
        """What a hook returned, ready for use. Raises PluginError where it breaks the contract."""
        raise NotImplementedError


class LossInfo(Info):
    """A loss class and who brought it."""

    kind, kinds, hook = "loss", "losses", "alignzoo_losses"
    cls: type[Loss]

    @staticmethod
    def checked(thing: Any) -> type[Loss]:
        check_loss_class(thing)
        return thing  # type: ignore[no-any-return]


class RewardInfo(Info):
    """A reward class, which a function may have been made into, and who brought it."""

    kind, kinds, hook = "reward", "rewards", "alignzoo_rewards"
    cls: type[Reward]
    checked = staticmethod(reward_class)


class FormatInfo(Info):
    """A format of rows and who brought it."""

    kind, kinds, hook = "format", "formats", "alignzoo_formats"
    cls: Format
    checked = staticmethod(checked_format)


class CallbackInfo(Info):
    """A callback class and who brought it."""

    kind, kinds, hook = "callback", "callbacks", "alignzoo_callbacks"
    cls: type[Callback]
    checked = staticmethod(callback_class)


ALL: tuple[type[Info], ...] = (LossInfo, RewardInfo, FormatInfo, CallbackInfo)
