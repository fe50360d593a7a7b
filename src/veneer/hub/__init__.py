"""The model hub: whether it is reachable, names of its repositories, and downloads into the local cache.

Uploads are in `veneer.publishing`.
"""

from .errors import HubError
from .names import RepoName, is_hub_name, parse_name
from .repo_files import download_adapter, download_dataset

__all__ = ["HubError", "RepoName", "download_adapter", "download_dataset", "is_hub_name", "parse_name"]
