"""Upload a finished run to the model hub with a model card."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from veneer.publishing import PushOptions, read_run, upload, write_folder, write_token
from veneer.training.report.run_folder import new_folder


@dataclass(frozen=True)
class PushConfig:
    """Configuration of `veneer push` and its defaults.

    Args:
        folder: run folder of a finished `veneer personalize`, `veneer control train` or `veneer transfer`.
        repo: repository on the hub, `USER/REPO`; it is created if it does not exist, and updated if it does.
        private: create a repository that only its owner can read.
        license: license of the adapter, an identifier of the hub such as `openrail` or `cc-by-4.0` (default: none, which the
            card says).
        dry_run: write the folder that would be uploaded, and upload nothing.
        out: new folder for the files to upload (default: `hub` in `folder` for a dry run, else a temporary folder).
    """

    folder: Path
    repo: str
    private: bool = False
    license: str | None = None
    dry_run: bool = False
    out: Path | None = None


def push(config: PushConfig) -> list[str]:
    """Writes a model card and the files of a run to a folder, and uploads it.

    Returns:
        Lines with the files, and the folder or the address of the repository.
    Raises:
        VeneerError: the run is not finished, or `repo` is no name of a repository.
        HubError: no access token, the hub refuses it, or is unreachable; nothing was uploaded.
    """
    options, run = PushOptions.of(config.repo, config.license), read_run(config.folder)
    token = "" if config.dry_run else write_token(config.repo)
    with tempfile.TemporaryDirectory() as temporary:
        out = config.out or (new_folder(config.folder, "hub") if config.dry_run else Path(temporary) / "hub")
        files = write_folder(run, options, out)
        lines = [f"{name}  {(out / name).stat().st_size:,} bytes" for name in files]
        if config.dry_run:
            return [*lines, f"not uploaded: the folder is {out}"]
        return [*lines, f"uploaded to {upload(out, config.repo, token, config.private)}"]
