"""Fonts of the labels on image grids: Latin, Greek and Cyrillic always, CJK if the system has a font for it."""

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
"""Fonts of the system for labels with Chinese, Japanese or Korean characters: Noto, macOS and Windows."""
INSTALL = "[install Noto Sans CJK]"


@cache
def label_font(size: int, file: str = FONT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """The font of labels, at a size in pixels: DejaVu Sans as matplotlib contains it, with Latin, Greek and Cyrillic letters.

    Args:
        file: another font, by the name of its file.
    Returns:
        Without matplotlib, Pillow's own font, which has Latin letters only. None if another font is not installed.
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
    """File of the font with the most characters of a text, the first of equal ones."""
    return max((FONT, *CJK_FONTS), key=lambda file: sum(_has(file, c) for c in words))


@cache
def printable(words: str) -> str:
    """Words in which characters that the font lacks are named in brackets: by Unicode, or what to install for CJK."""
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
    """The font that a text is written in."""
    return label_font(size, _file_for(words)) or label_font(size)
