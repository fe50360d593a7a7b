"""The app: `veneer app` opens a page in the browser that does what the commands do."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from veneer.injection import OptionError

from . import components
from .context import Studio
from .limits import LIMITS
from .pages import pages
from .pages.generate.generate_page import connect
from .request_limits import Guard

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    body_text_color_subdued="*neutral_600",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
)
"""Fonts that every machine has: nothing is fetched from elsewhere. Colours that can be told apart by eyes that see little."""
KEPT = 24 * 3600
"""Seconds for which files are kept that visitors have brought or were shown."""
OWN = ("localhost", "127.0.0.1", "::1")
"""Names of this machine for itself."""
STYLE, HEAD = (Path(__file__).with_name(name) for name in ("style.css", "head.html"))


@dataclass(frozen=True)
class AppConfig:
    """Configuration of `veneer app` and its defaults.

    Args:
        host: address to listen on. Addresses other than this machine's need `auth`.
        port: port to listen on; 0 selects a free one.
        auth: accounts as NAME:PASSWORD, or a file with one per line. Each account has its own workspace.
        share: create a public address through Gradio's service, which needs the network and `auth`.
        workspace: folder for the jobs and files of all accounts.
        device: device for generation, such as `cuda` (default: a GPU if there is one).
        browser: open a browser window.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    auth: tuple[str, ...] = ()
    share: bool = False
    workspace: Path = Path("veneer-workspace")
    device: str | None = None
    browser: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            message = f"--port is {self.port}; expected 0 (any free port) to 65535."
            raise OptionError(message, option="port", given=self.port, expected=(0, 65535))


def app(config: AppConfig) -> None:
    """Open the app, and serve it until it is interrupted. A training job that runs then goes on, and is found again.

    Raises:
        VeneerError: another address than this machine's own, or sharing, without a login; a login that is none; or an address
            or port that cannot be listened on.
    """
    logins = read_logins(config.auth)
    if (config.share or not _own(config.host)) and not logins:
        what = "--share" if config.share else f"--host {config.host}"
        message = f"{what} lets others in, who could train and read files here. Say who may, with --auth NAME:PASSWORD."
        raise OptionError(message, option="auth", where="share" if config.share else "host", given=())
    check_address(config.host, config.port)
    studio = Studio.at(config.workspace.expanduser().resolve(), config.device)
    files = _cache(studio.root)
    _import_early()
    studio.queue.start()
    page = build(studio)
    _, address, _ = page.launch(
        app_kwargs={"middleware": [Middleware(Guard, hosts=None if logins else {*OWN, config.host}, files=files)]},
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
        theme=THEME,
        css_paths=[STYLE],
        head_paths=[HEAD],
        enable_monitoring=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"veneer is at {page.share_url or address}; files are in {studio.root}. End it with Ctrl-C.", flush=True)
    page.block_thread()


def check_address(host: str, port: int) -> None:
    """Look whether this process may listen there, before anything is loaded.

    Raises:
        VeneerError: the port is taken or reserved, or the address is not one of this machine.
    """
    other = "give another with --port N, or --port 0 for any free one"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(1)
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
    """The folder from which Gradio serves files, in the workspace and not where all of a machine look; old files go."""
    folder = root / "cache"
    folder.mkdir(exist_ok=True)
    for file in folder.rglob("*"):
        if file.is_file() and time.time() - file.stat().st_mtime > KEPT:
            file.unlink(missing_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


def _import_early() -> None:
    """diffusers imports its parts when they are first asked for, and fails where two visitors' threads ask at once."""
    from diffusers import AutoencoderKL, DiffusionPipeline  # noqa: F401


def build(studio: Studio) -> gr.Blocks:
    """The page with all tabs."""
    components.bound()
    with components.Page(title="veneer", analytics_enabled=False, delete_cache=(3600, KEPT)) as page:
        gr.Markdown("# veneer\nThin trained layers on frozen models: train, generate, control, classify.", elem_id="head")
        with gr.Tabs() as tabs:
            built: dict[str, Any] = {}
            for each in pages():
                with gr.Tab(each.name, id=each.slug):
                    gr.Markdown(each.about, elem_classes="about")
                    built[each.slug] = each.build(studio)
        connect(studio, tabs, built)
    page.queue(max_size=LIMITS.waiting, api_open=False)
    return page


def read_logins(given: tuple[str, ...]) -> list[tuple[str, str]]:
    """Names and passwords.

    Raises:
        VeneerError: neither NAME:PASSWORD nor a file of such lines, or a name twice.
    """
    found: dict[str, str] = {}
    for line in filter(None, (line.strip() for word in given for line in _lines(word))):
        name, colon, password = line.partition(":")
        name = name.strip()
        if not (name and colon and len(password) >= 8):
            whose = f"the login of {name!r}" if colon and name else "a login"  # without a colon, all may be a password
            raise OptionError(
                f"--auth: {whose} is not NAME:PASSWORD with at least 8 characters after ':', nor a file of such lines.",
                option="auth",
                expected="NAME:PASSWORD",
            )
        if name in found:
            raise OptionError(f"--auth: {name!r} is there twice; expected each name once.", option="auth", given=name)
        found[name] = password
    return list(found.items())


def _lines(word: str) -> list[str]:
    """Of a file, or the word itself if there is none of that name."""
    try:
        path = Path(word).expanduser()
        if not path.is_file():
            return [word]
    except (OSError, RuntimeError, ValueError):  # too long for a name, or of a user that there is not
        return [word]
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"--auth: {path} cannot be read ({error}); expected a text file of lines NAME:PASSWORD."
        raise OptionError(message, option="auth", file=path, given="unreadable") from error


def _own(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
