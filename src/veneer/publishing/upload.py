"""Upload of a folder to a repository of the model hub."""

from __future__ import annotations

import glob
from pathlib import Path

from veneer.hub import HubError
from veneer.hub.connection import unreachable
from veneer.hub.errors import LOGIN, hub_error
from veneer.injection.errors import VeneerError

from .card_data import MANIFEST

KEPT = ("README.md", ".gitattributes")
"""Files that an upload never deletes."""


def write_token(repo: str) -> str:
    """The access token of the hub's own login or of HF_TOKEN.

    Raises:
        HubError: there is none, or the hub is unreachable.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        message = f"push: no access token for {repo!r}; {LOGIN} with write access. --dry-run needs none."
        raise HubError(message, where="token", given=repo, expected="write access")
    why = unreachable()
    if why:
        message = f"push: {why}. Check the connection and push again; --dry-run writes the folder without one."
        raise HubError(message, where="hub", given=repo, expected="connection")
    return token


def upload(folder: Path, repo: str, token: str, private: bool = False) -> str:
    """Creates the repository if needed and uploads all files of a folder in one commit.

    Files of an earlier upload, as its card lists them, are deleted if the folder does not have them; other files stay.

    Args:
        folder: the files to upload. `repo`: `USER/REPO`. `token`: with write access.
        private: only for the owner. The visibility of an existing repository is not changed.
    Returns:
        Address of the repository's page.
    Raises:
        HubError: the hub refuses the token or a file, or `private` and the repository exists and is public.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            message = (
                f"push: {repo!r} exists and is public, but --private was passed. Make it private in its settings, or use another."
            )
            raise HubError(message, where="private", given=repo, expected="private")
        stale = [glob.escape(name) for name in uploaded_files(repo, token)]
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload adapter and model card", delete_patterns=stale or None
        )
    except VeneerError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds, of several libraries
        raise hub_error(error, repo, "write") from error
    return str(url)


def uploaded_files(repo: str, token: str) -> list[str]:
    """Files that the metadata of a repository's model card lists; none for a card that `push` did not write."""
    import yaml
    from huggingface_hub import hf_hub_download, metadata_load
    from huggingface_hub.errors import EntryNotFoundError

    try:
        metadata = metadata_load(hf_hub_download(repo, "README.md", token=token)) or {}
    except (EntryNotFoundError, ValueError, yaml.YAMLError):  # no card, or one with invalid metadata
        return []
    names = metadata.get(MANIFEST)
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and name not in KEPT and not name.endswith("/")]
