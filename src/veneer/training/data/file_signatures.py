"""Kind of a file that is not a supported image, from its first bytes."""

from __future__ import annotations

import codecs
from typing import NamedTuple

_DAMAGED = "Copy or download it again."
_EXPORT = "Export it as PNG or JPEG."


class FileKind(NamedTuple):
    """Kind of a file: short name, description, and remedy."""

    name: str
    description: str
    remedy: str


def file_kind(data: bytes) -> FileKind:
    """The kind of a file with this content."""
    head = data[:512].lstrip().lower()
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        export = "Export it as JPEG (on an iPhone: Settings, Camera, Formats, Most Compatible)."
        return FileKind("HEIC", "a HEIC image", export)
    for start, (name, description) in _SIGNATURES.items():
        if data.startswith(start) or brand == start:
            return FileKind(name, description, _DAMAGED if name.startswith("damaged") else _EXPORT)
    if brand:
        return FileKind("video", "a video or an unknown image of that family", "Export a frame as PNG or JPEG.")
    if b"<svg" in head:
        return FileKind("SVG", "an SVG drawing", "Export it as PNG.")
    if head.startswith((b"<!doctype html", b"<html")):
        return FileKind("HTML", "a web page", "The download gave an error page; download the image itself.")
    if head.startswith(b"version https://git-lfs"):
        return FileKind("Git LFS pointer", "a Git LFS pointer", "Run `git lfs pull`.")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[:200])  # tolerates a truncated character
        if "\0" not in text:
            return FileKind("text", f"text ({text[:30]!r})", "It is not an image; remove or replace it.")
    except UnicodeDecodeError:
        pass
    return FileKind("unknown", f"unknown data (it starts with {data[:8].hex(' ')})", _EXPORT)


_SIGNATURES = {
    b"avif": ("AVIF", "an AVIF image"),
    b"avis": ("AVIF", "an AVIF sequence"),
    b"\x89PNG": ("damaged PNG", "a damaged PNG"),
    b"\xff\xd8\xff": ("damaged JPEG", "a damaged JPEG"),
    b"GIF8": ("damaged GIF", "a damaged GIF"),
    b"RIFF": ("damaged WEBP", "a damaged WEBP (or a sound or video file)"),
    b"BM": ("damaged BMP", "a damaged BMP"),
    b"II*\0": ("damaged TIFF", "a damaged TIFF or a camera's raw file"),
    b"MM\0*": ("damaged TIFF", "a damaged TIFF or a camera's raw file"),
    b"\xff\x0a": ("JPEG XL", "a JPEG XL image"),
    b"\0\0\0\x0cJXL ": ("JPEG XL", "a JPEG XL image"),
    b"\0\0\0\x0cjP  ": ("JPEG 2000", "a JPEG 2000 image"),
    b"8BPS": ("PSD", "a Photoshop document"),
    b"%PDF": ("PDF", "a PDF document"),
    b"PK\x03\x04": ("ZIP", "a ZIP archive"),
}
