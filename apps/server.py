"""Server of `veneer app`."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from veneer.injection import OptionError

from . import components
from .appearance.theme import HEAD, STYLE, brand, theme
from .base_access import BaseAccess, install_access
from .cache_eviction import CacheEviction, paths_in_use
from .context import Context
from .limits import LIMITS
from .pages import pages
from .pages.gallery.gallery_page import connect_gallery
from .pages.generate.generate_page import connect_runs
from .pages.showcase.showcase import connect_showcase
from .quotas import GIB, Quotas
from .request_limits import LimitsMiddleware
from .workspace import CACHE

FILE_LIFETIME = 24 * 3600
"""Seconds for which uploaded and displayed files are kept."""
QUEUE_INTERVAL = 0.05
"""Seconds between the looks of Gradio's queue for events, as on Windows: its 0.001 elsewhere take a tenth of a core at rest."""
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
"""Names of the loopback address."""


@dataclass(frozen=True)
class AppConfig:
    """Configuration of `veneer app` and its defaults.

    Args:
        host: address to listen on; others than the default can be reached from the network and need `auth`.
        port: port to listen on; 0 selects a free one.
        auth: accounts that may log in, as NAME:PASSWORD, or a file with one per line, which keeps them out of the process list.
            Each account has its own workspace.
        share: create a public address through Gradio's service; needs the network and `auth`.
        workspace: folder for the jobs and files of all accounts.
        device: device for generation, such as `cuda` (default: a GPU if there is one).
        browser: open a browser window.
        images_per_hour: images that each account may generate per hour.
        storage: GiB that the files of each account may have.
        base_folders: with accounts, folders whose base models the accounts may name; other paths of this machine are rejected.
        hub: download base models and adapters that users name on the hub.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    auth: tuple[str, ...] = ()
    share: bool = False
    workspace: Path = Path("veneer-workspace")
    device: str | None = None
    browser: bool = True
    images_per_hour: int = 600
    storage: int = 20
    base_folders: tuple[Path, ...] = ()
    hub: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            message = f"--port is {self.port}; expected 0 (any free port) to 65535."
            raise OptionError(message, option="port", given=self.port, expected=(0, 65535))
        for name in ("images_per_hour", "storage"):
            if (given := getattr(self, name)) < 1:
                message = f"--{name.replace('_', '-')} is {given}; expected at least 1."
                raise OptionError(message, option=name, given=given, expected=1)

    def quotas(self) -> Quotas:
        """Quotas of each account."""
        return Quotas(self.images_per_hour, self.storage * GIB)


def app(config: AppConfig) -> None:
    """Serves the app until it is interrupted. A running training job continues and is found again on the next start.

    Raises:
        VeneerError: a non-loopback address or sharing without logins, an invalid login, or an address or port that is
            unavailable.
    """
    logins = read_logins(config.auth)
    if (config.share or not _is_loopback(config.host)) and not logins:
        option = "--share" if config.share else f"--host {config.host}"
        message = (
            f"{option} makes the app reachable for others, who could train and read files. Add logins with --auth NAME:PASSWORD."
        )
        raise OptionError(message, option="auth", where="share" if config.share else "host", given=())
    check_address(config.host, config.port)
    context = Context.create(config.workspace.expanduser().resolve(), config.device, config.quotas())
    install_access(BaseAccess(config.base_folders if logins else None, config.hub))
    files = _cache(context.root)
    _import_early()
    context.queue.start()
    CacheEviction([files, _temporary(context.root)], LIMITS.cache_bytes, lambda: paths_in_use(context.queue)).start()
    page = build(context)
    _, address, _ = page.launch(
        app_kwargs={
            "middleware": [
                Middleware(
                    LimitsMiddleware,
                    hosts=None if logins else {*LOOPBACK_NAMES, config.host},
                    files=files,
                    stored=context.quotas.stored_bytes,
                )
            ]
        },
        allowed_paths=[],
        mcp_server=False,
        run_history=False,
        server_name=config.host,
        server_port=config.port or None,
        auth=logins or None,
        share=config.share,
        inbrowser=config.browser,
        max_file_size=LIMITS.file_bytes,
        state_session_capacity=LIMITS.sessions,
        ssr_mode=False,
        footer_links=[],
        theme=theme(),
        css_paths=[STYLE],
        head_paths=[HEAD],
        enable_monitoring=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"veneer is at {page.share_url or address}; files are in {context.root}. Press Ctrl-C to stop.", flush=True)
    page.block_thread()


def check_address(host: str, port: int) -> None:
    """Checks that the process can listen on an address, before anything is loaded.

    Raises:
        VeneerError: the port is in use or reserved, or the address does not belong to this machine.
    """
    other = "choose another with --port N, or a free one with --port 0"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use by another program; {other}."
            raise OptionError(message, option="port", given=port, where="used") from error
        if error.errno == errno.EACCES:
            message = f"port {port} of {host} is reserved by the system; {other}."
            raise OptionError(message, option="port", given=port, where="reserved") from error
        message = f"--host {host}: {error.strerror or error}; expected an address of this machine."
        raise OptionError(message, option="host", given=host) from error


def _cache(root: Path) -> Path:
    """Gradio's cache folder, inside the workspace rather than the shared temporary folder; deletes expired files."""
    folder = root / CACHE
    folder.mkdir(exist_ok=True)
    for file in folder.rglob("*"):
        if file.is_file() and time.time() - file.stat().st_mtime > FILE_LIFETIME:
            file.unlink(missing_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


def _temporary(root: Path) -> Path:
    """Folder for temporary files, whose copies Gradio serves. In the shared one nobody would delete them."""
    folder = root / "temporary"
    folder.mkdir(mode=0o700, exist_ok=True)
    tempfile.tempdir = str(folder)
    return folder


def _import_early() -> None:
    """Imports diffusers classes now: its lazy imports fail if two threads trigger them at once."""
    from diffusers import AutoencoderKL, DiffusionPipeline  # noqa: F401


def build(context: Context) -> components.AppBlocks:
    """Builds the interface with all tabs."""
    components.install_limits()
    with components.AppBlocks(title="veneer", analytics_enabled=False, delete_cache=(3600, FILE_LIFETIME)) as page:
        gr.HTML(brand(), elem_id="head")
        with gr.Tabs() as tabs:
            built: dict[str, Any] = {}
            for each in pages():
                with gr.Tab(each.name, id=each.slug):
                    if each.about:
                        gr.Markdown(each.about, elem_classes="about")
                    built[each.slug] = each.build(context)
        connect_runs(context, tabs, built)
        connect_gallery(context, tabs, built)
        connect_showcase(tabs, built["train"][2])
    page.queue(max_size=LIMITS.waiting, api_open=False)
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = QUEUE_INTERVAL
    return page


def read_logins(entries: tuple[str, ...]) -> list[tuple[str, str]]:
    """Parses logins into names and passwords.

    Raises:
        VeneerError: an entry is neither NAME:PASSWORD nor a file of such lines, or a name occurs twice.
    """
    logins: dict[str, str] = {}
    for line in filter(None, (line.strip() for entry in entries for line in _lines(entry))):
        name, colon, password = line.partition(":")
        name = name.strip()
        if not (name and colon and len(password) >= 8):
            login = f"the login of {name!r}" if colon and name else "a login"  # without a colon, the whole text may be a password
            raise OptionError(
                f"--auth: {login} is not NAME:PASSWORD with at least 8 characters after ':', nor a file of such lines.",
                option="auth",
                expected="NAME:PASSWORD",
            )
        if name in logins:
            raise OptionError(f"--auth: {name!r} occurs twice; expected each name once.", option="auth", given=name)
        logins[name] = password
    return list(logins.items())


def _lines(entry: str) -> list[str]:
    """Lines of a file, or the entry itself if no such file exists."""
    try:
        path = Path(entry).expanduser()
        if not path.is_file():
            return [entry]
    except (OSError, RuntimeError, ValueError):  # too long for a file name, or the home folder of an unknown user
        return [entry]
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"--auth: {path} cannot be read ({error}); expected a text file of lines NAME:PASSWORD."
        raise OptionError(message, option="auth", file=path, given="unreadable") from error


def _is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
