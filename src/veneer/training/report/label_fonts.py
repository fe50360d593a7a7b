"""Fonts for labels of image grids: Latin, Greek and Cyrillic, and CJK if a system font is installed."""

from __future__ import annotations

import importlib.util
import logging
import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from PIL import ImageFont

_log = logging.getLogger(__name__)

FONT = "DejaVuSans.ttf"
CJK_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc")
"""System fonts for Chinese, Japanese and Korean: Noto, macOS and Windows."""
INSTALL = "[install Noto Sans CJK]"


@cache
def label_font(size: int, file: str = FONT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """Loads a label font at a size in pixels: DejaVu Sans from matplotlib, with Latin, Greek and Cyrillic letters.

    Args:
        file: file name of another font.
    Returns:
        The font; without matplotlib Pillow's default font, which has only Latin letters. None if `file` is not installed.
    """
    package = importlib.util.find_spec("matplotlib")
    if file == FONT and package and package.origin:
        file = str(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / FONT)
    try:
        return ImageFont.truetype(file, size)
    except OSError:
        return ImageFont.load_default(size) if Path(file).name == FONT else None


@cache
def _has(file: str, character: str) -> bool:
    font = label_font(16, file)
    return font is not None and (character.isascii() or bytes(font.getmask(character)) != bytes(font.getmask("\uffff")))


def _file_for(words: str) -> str:
    """File of the font with the most characters of a text."""
    return max((FONT, *CJK_FONTS), key=lambda file: sum(_has(file, c) for c in words))


@cache
def printable(words: str) -> str:
    """The text with characters that no font has replaced by their Unicode names in brackets, or for CJK by what to install."""
    words = unicodedata.normalize("NFC", words)
    file = _file_for(words)
    shown = "".join(c if c.isspace() or _has(file, c) else _name(c) for c in words)
    if INSTALL in shown:
        _log.warning("no font for %r: install Noto Sans CJK (Debian and Ubuntu: apt install fonts-noto-cjk)", words)
    return re.sub(rf"{re.escape(INSTALL)}(?:\s*{re.escape(INSTALL)})*", INSTALL, shown)


def _name(character: str) -> str:
    name = unicodedata.name(character, "")
    cjk = name.startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH", "BOPOMOFO"))
    invisible = unicodedata.category(character) in ("Cc", "Cf", "Mn") or not name
    return INSTALL if cjk else "" if invisible else f"[{name.lower()}]"


def font_for(words: str, size: int) -> Any:
    """The font for a text."""
    return label_font(size, _file_for(words)) or label_font(size)
