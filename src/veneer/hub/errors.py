"""The error of the hub, from the dozen exceptions of its client."""

from __future__ import annotations

from typing import Any

from veneer.injection.errors import VeneerError

LOGIN = "log in with 'hf auth login', or set HF_TOKEN to an access token"


class HubError(VeneerError):
    """A repository of the model hub that cannot be read or written.

    Attributes, beside those of `VeneerError`:
        status: HTTP status of the response, or None without one. `given`: the name of the repository or file. `expected`: the
            files to choose from, or what is needed.
    """

    def __init__(self, message: str = "", *, status: int | None = None, **data: Any) -> None:
        super().__init__(message, **data)
        self.status = status


def hub_error(error: Exception, name: str, action: str) -> HubError:
    """The error for an exception of the hub's client.

    Args:
        name: repository or file, as the user wrote it. `action`: `read` or `write`.
    """
    from huggingface_hub import errors

    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    problems: list[tuple[type[Exception], str, str]] = [
        (errors.GatedRepoError, "gated", f"is gated. Accept its conditions on its page, then {LOGIN}."),
        (
            errors.RepositoryNotFoundError,
            "repository",
            "is neither a local file or folder nor a repository of the hub that you can read. Check the spelling; if it is "
            f"private, {LOGIN}.",
        ),
        (errors.RevisionNotFoundError, "revision", "has no such revision. Check the branch, tag or commit after the @."),
        (errors.EntryNotFoundError, "file", "has no such file. Check the file name."),
    ]
    if action == "read":
        for kind, where, problem in problems:
            if isinstance(error, kind):
                return HubError(f"hub: {name!r} {problem}", where=where, given=name, status=status)
    if status in (401, 403):
        needed = f"{action} access"
        why = "no valid access token" if status == 401 else f"the access token has no {needed} to it"
        message = f"hub: {name!r}: {why} (status {status}); {LOGIN} with {needed}, and check the user name."
        return HubError(message, where="token", given=name, expected=needed, status=status)
    message = f"hub: {name!r}: the request failed ({describe(error)}). Check the name and the connection, and try again."
    return HubError(message, where="hub", given=name, status=status)


def describe(error: Exception) -> str:
    """Class and first line of an exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
