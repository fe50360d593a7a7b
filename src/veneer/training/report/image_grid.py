"""Image grids: rows of images with captions, and the before-after grid of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from veneer.injection.errors import VeneerError

from .label_fonts import font_for, printable
from .previews import PreviewPair

INK, GRAY, LINE, PAPER = (24, 24, 27), (113, 113, 122), (212, 212, 216), (255, 255, 255)
MARGIN, GAP, WIDE_GAP, APART = 24, 6, 22, 44


@dataclass(frozen=True)
class GridRow:
    """One row of an image grid.

    Args:
        label: text above the images, wrapped if long.
        groups: groups of images with a gap between them (base | adapted). None leaves a cell empty.
    """

    label: str
    groups: tuple[tuple[Image.Image | None, ...], ...]


def make_grid(
    rows: Sequence[GridRow],
    *,
    title: str = "",
    note: str = "",
    columns: Sequence[str] = (),
    footer: str = "",
    cell: int = 192,
    across: int = 1,
) -> Image.Image:
    """Renders an image grid: title, note, then each row with its label and images; column heads above the groups.

    Args:
        columns: heads of the groups, above the first row with that number of groups.
        across: number of equally long rows side by side, so that a grid of short rows is not a long strip.
        footer: lines of text; two or more spaces separate aligned columns.
        cell: side of a cell in pixels. Images are scaled to fit it and keep their aspect ratio.
    Raises:
        VeneerError: no images.
    """
    if not any(image for row in rows for group in row.groups for image in group):
        raise VeneerError("image grid: no images.", where="rows", given=0)
    lines = _lines(rows, across)
    width = max(300, *(_across(line, cell) for line in lines)) + 2 * MARGIN
    page = _Page(width)
    page.text(title, 24, INK)
    page.text(note, 14, GRAY)
    page.y += GAP
    has_heads = False
    for line in lines:
        if columns and not has_heads and len(line[0].groups) == len(columns):
            page.heads(line, columns, cell)
            has_heads = True
        page.labels(line, cell)
        page.images(line, cell)
    page.table(footer, 14, GRAY)
    return page.image()


def before_after(
    photos: Sequence[Image.Image],
    pairs: Sequence[PreviewPair],
    *,
    title: str = "",
    note: str = "",
    footer: str = "",
    heads: tuple[str, str] = ("base", "with the adapter"),
    cell: int = 192,
    shown: int = 6,
) -> Image.Image:
    """Image grid of a run: the photos, then for each prompt the images of the base and the adapted model, seed by seed.

    Args:
        shown: maximum number of photos.
        footer: text below, such as `str(metrics)`.
    """
    rows = subject_rows(photos, pairs, shown=shown)
    across = 2 if len(pairs) == len({pair.prompt for pair in pairs}) else 1
    return make_grid(rows, title=title, note=note, columns=heads, footer=footer, cell=cell, across=across)


def subject_rows(
    photos: Sequence[Image.Image], pairs: Sequence[PreviewPair], label: str = "photos", shown: int = 6
) -> list[GridRow]:
    """Rows of one subject: its photos, then for each prompt the images of the base and the adapted model, seed by seed.

    Args:
        label: of the photos. `shown`: maximum number of photos.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    grouped = {prompt: [pair for pair in pairs if pair.prompt == prompt] for prompt in prompts}
    rows = [GridRow(p, (tuple(x.base for x in found), tuple(x.adapted for x in found))) for p, found in grouped.items()]
    if photos:
        more = f" ({shown} of {len(photos)})" if len(photos) > shown else ""
        rows.insert(0, GridRow(f"{label}{more}", (tuple(photos[:shown]),)))
    return rows


def fit_in_cell(image: Image.Image, cell: int) -> Image.Image:
    """An image scaled to fit a square cell with Lanczos resampling."""
    factor = cell / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _lines(rows: Sequence[GridRow], across: int) -> list[list[GridRow]]:
    """Lines of up to `across` consecutive rows with equal groups."""
    lines: list[list[GridRow]] = []
    for row in rows:
        if lines and len(lines[-1]) < across and _form(lines[-1][0]) == _form(row):
            lines[-1].append(row)
        else:
            lines.append([row])
    return lines


def _form(row: GridRow) -> list[int]:
    return [len(group) for group in row.groups]


def _across(line: Sequence[GridRow], cell: int) -> int:
    return len(line) * (_width(line[0], cell) + APART) - APART


def _width(row: GridRow, cell: int) -> int:
    images = sum(len(group) for group in row.groups)
    return images * (cell + GAP) - GAP * len(row.groups) + WIDE_GAP * (len(row.groups) - 1)


class _Page:
    """Layout of a page: collects images and text with positions, and draws them once the height is known."""

    def __init__(self, width: int) -> None:
        self.width, self.y = width, MARGIN
        self.pieces: list[tuple[int, int, Image.Image]] = []

    def text(self, words: str, size: int, color: tuple[int, int, int], left: int = MARGIN, width: int | None = None) -> None:
        """Adds text, wrapped at `width` (default: that of the page)."""
        if not words:
            return
        for line in printable(words).splitlines():
            for part in _wrapped(line, size, width or self.width - 2 * MARGIN):
                self.pieces.append((left, self.y, _render(part, size, color)))
                self.y += int(size * 1.4)
        self.y += size // 2

    def labels(self, line: Sequence[GridRow], cell: int) -> None:
        """Adds the label of each row; a single row uses the width of the page."""
        top, low, wide = self.y, self.y, _width(line[0], cell)
        for left, row in zip(_lefts(line, cell), line, strict=True):
            self.y = top
            self.text(row.label, 16, INK, left, wide if len(line) > 1 else None)
            low = max(low, self.y)
        self.y = low

    def table(self, words: str, size: int, color: tuple[int, int, int]) -> None:
        """Adds lines as a table: two or more spaces separate columns; other lines are plain text."""
        rows = [re.split(r"\s{2,}", line) for line in printable(words).splitlines()]
        table = [row for row in rows if len(row) > 1]
        columns = max((len(row) for row in table), default=0)
        widths = [max(_length(row[i], size) if i < len(row) else 0 for row in table) + 2 * size for i in range(columns)]
        for row in rows:
            if len(row) == 1:
                self.text(row[0], size, color)
                continue
            for i, cell in enumerate(row):
                self.pieces.append((MARGIN + sum(widths[:i]), self.y, _render(cell, size, color)))
            self.y += int(size * 1.5)

    def heads(self, line: Sequence[GridRow], columns: Sequence[str], cell: int) -> None:
        """Adds column heads with a rule, each as wide as its group."""
        self.y += 8
        for left, row in zip(_lefts(line, cell), line, strict=True):
            for x, width, word in zip(*_spans(row, cell, left), columns, strict=True):
                self.pieces.append((x, self.y, _render(_ellipsize(printable(word), 18, width), 18, INK)))
                self.pieces.append((x, self.y + 28, Image.new("RGB", (width, 2), LINE)))
        self.y += 38

    def images(self, line: Sequence[GridRow], cell: int) -> None:
        """Adds the images of a line of rows; the line is as high as its highest image."""
        high = 0
        for left, row in zip(_lefts(line, cell), line, strict=True):
            for x, group in zip(_spans(row, cell, left)[0], row.groups, strict=True):
                for i, image in enumerate(group):
                    if image is not None:
                        small = fit_in_cell(image, cell)
                        self.pieces.append((x + i * (cell + GAP) + (cell - small.width) // 2, self.y, small))
                        high = max(high, small.height)
        self.y += high + 16

    def image(self) -> Image.Image:
        page = Image.new("RGB", (self.width, self.y + MARGIN // 2), PAPER)
        for x, y, piece in self.pieces:
            page.paste(piece, (x, y))
        return page


def _lefts(line: Sequence[GridRow], cell: int) -> list[int]:
    """Left edges of the rows in a line."""
    return [MARGIN + i * (_width(line[0], cell) + APART) for i in range(len(line))]


def _spans(row: GridRow, cell: int, x: int) -> tuple[list[int], list[int]]:
    """Left edges and widths of the groups of a row that starts at `x`."""
    lefts, widths = list[int](), list[int]()
    for group in row.groups:
        width = len(group) * (cell + GAP) - GAP
        lefts.append(x)
        widths.append(width)
        x += width + WIDE_GAP
    return lefts, widths


def _length(words: str, size: int) -> int:
    return int(font_for(words, size).getlength(words)) + 1


def _render(words: str, size: int, color: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (max(1, _length(words, size)), int(size * 1.35)), PAPER)
    baseline = font_for("", size).getmetrics()[0]  # aligns fonts with different ascenders
    ImageDraw.Draw(image).text((0, baseline), words, color, font_for(words, size), anchor="ls")
    return image


def _ellipsize(words: str, size: int, width: int) -> str:
    if _length(words, size) <= width:
        return words
    while words and _length(words + "…", size) > width:
        words = words[:-1]
    return words + "…"


def _wrapped(line: str, size: int, width: int) -> list[str]:
    if _length(line, size) <= width:
        return [line]
    lines, current = [], ""
    for word in line.split(" "):
        longer = f"{current} {word}" if current else word
        if _length(longer, size) <= width:
            current = longer
        else:
            lines += [current] if current else []
            current = _ellipsize(word, size, width)
    return [*lines, current]
