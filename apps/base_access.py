"""Base models and adapters that visitors may name: local folders inside those of the server's owner, and names on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.base_models import BUNDLED, BaseModelError
from veneer.base_models.loading import HUB_NAME
from veneer.hub import HubError, parse_name
from veneer.hub.connection import unreachable

from .workspace import printable


@dataclass(frozen=True)
class BaseAccess:
    """What visitors may name.

    Args:
        folders: folders whose base models are allowed; None allows any path, for an app without logins.
        hub: whether base models and adapters are downloaded from the hub.
    """

    folders: tuple[Path, ...] | None = None
    hub: bool = True

    def check(self, name: str) -> str:
        """Checks the name of a base model, and returns it. The answer does not depend on whether a forbidden path exists.

        Raises:
            BaseAccessError: a path outside of `folders`, or a name on the hub without `hub`.
        """
        path = Path(name).expanduser()
        if name in BUNDLED or (not _is_path(name) and "/" not in name and not path.exists()):
            return name
        if HUB_NAME.fullmatch(name) and not path.exists():
            return self.check_hub(name)
        if self.folders is None or any(path.resolve().is_relative_to(folder.resolve()) for folder in self.folders):
            return name
        message = (
            f"base: {printable(name)!r} is not among the base models of this server; expected 'bundled', a name on the hub such "
            "as owner/model, or a folder that its owner allows."
        )
        raise BaseAccessError(message, where="base", given=name, expected=tuple(map(str, self.folders)), reason="folder")

    def check_hub(self, name: str) -> str:
        """Checks that names on the hub are allowed, and returns the name.

        Raises:
            BaseAccessError: they are not.
        """
        if not self.hub:
            message = f"{printable(name)!r} is a name on the hub, from which this server does not download."
            raise BaseAccessError(message, where="hub", given=name, reason="hub")
        return name


class BaseAccessError(BaseModelError):
    """A base model or adapter that visitors of this server may not name.

    Attributes, beside those of `VeneerError`:
        reason: `folder` or `hub`.
    """

    def __init__(self, message: str = "", *, reason: str = "", **data: Any) -> None:
        super().__init__(message, **data)
        self.reason = reason


_current = [BaseAccess()]


def install_access(access: BaseAccess) -> None:
    """Sets what the visitors of this process may name."""
    _current[0] = access


def current_access() -> BaseAccess:
    """What the visitors of this process may name; any path by default."""
    return _current[0]


def check_access(name: str) -> str:
    """Checks the name of a base model, and returns it; see `BaseAccess.check`."""
    return current_access().check(name)


def check_download(name: str) -> None:
    """Checks that a base model with a name on the hub can be loaded: from the local cache, or because the hub responds.

    Raises:
        HubError: neither.
    """
    if HUB_NAME.fullmatch(name) is None or Path(name).exists() or _is_cached(name):
        return
    if reason := unreachable():
        message = f"{printable(name)!r} is not in the cache of this server, and {reason}."
        raise HubError(message, where="hub", given=name)


def check_adapter_name(text: str) -> str:
    """Checks the name of an adapter on the hub, `USER/REPO[/FILE][@REVISION]`, and returns it.

    Raises:
        HubError: not such a name. BaseAccessError: this server does not download.
    """
    name = text.strip()
    if parse_name(name) is None:
        message = f"{printable(name)!r} is no name on the hub; expected USER/REPO or USER/REPO/FILE.safetensors."
        raise HubError(message, where="name", given=name, expected="USER/REPO[/FILE][@REVISION]")
    return current_access().check_hub(name)


def _is_path(name: str) -> bool:
    return name.startswith((".", "~")) or "\\" in name or Path(name).is_absolute()


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "model_index.json"), str)
