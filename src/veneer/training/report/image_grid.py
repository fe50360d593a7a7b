"""Sheets: pictures in rows with captions on one page, and the before-after sheet of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from veneer.injection.errors import VeneerError

from .label_fonts import font_for, printable
from .previews import Pair

INK, GREY, LINE, PAPER = (24, 24, 27), (113, 113, 122), (212, 212, 216), (255, 255, 255)
MARGIN, GAP, WIDE_GAP, APART = 24, 6, 22, 44


@dataclass(frozen=True)
class Row:
    """One line of a sheet.

    Args:
        label: shown above the pictures; long ones are wrapped.
        groups: pictures, in groups that are set apart (base | adapted). A None leaves its place empty.
    """

    label: str
    groups: tuple[tuple[Image.Image | None, ...], ...]


def sheet(
    rows: Sequence[Row],
    *,
    title: str = "",
    note: str = "",
    columns: Sequence[str] = (),
    footer: str = "",
    cell: int = 192,
    across: int = 1,
) -> Image.Image:
    """A page of pictures: title, note, then row by row its label and pictures; column heads above every group.

    Args:
        columns: heads of the groups, above the first row in which there are as many groups.
        across: rows of as many pictures that stand beside one another, so that a page of narrow rows is no long strip.
        footer: lines; runs of two and more spaces separate columns, which are set below one another.
        cell: side of a picture's place in pixels. Pictures keep their aspect and fill it, enlarged if they are small.
    Raises:
        VeneerError: no pictures.
    """
    if not any(picture for row in rows for group in row.groups for picture in group):
        raise VeneerError("sheet: no pictures.", where="rows", given=0)
    lines = _lines(rows, across)
    width = max(300, *(_across(line, cell) for line in lines)) + 2 * MARGIN
    page = _Page(width)
    page.text(title, 24, INK)
    page.text(note, 14, GREY)
    page.y += GAP
    headed = False
    for line in lines:
        if columns and not headed and len(line[0].groups) == len(columns):
            page.heads(line, columns, cell)
            headed = True
        page.labels(line, cell)
        page.pictures(line, cell)
    page.table(footer, 14, GREY)
    return page.image()


def before_after(
    photos: Sequence[Image.Image],
    pairs: Sequence[Pair],
    *,
    title: str = "",
    note: str = "",
    footer: str = "",
    heads: tuple[str, str] = ("base", "with the adapter"),
    cell: int = 192,
    shown: int = 6,
) -> Image.Image:
    """The sheet of a run: the photos on top, then for each prompt the base's pictures beside the adapted ones, seed by seed.

    Args:
        shown: photos shown at most.
        footer: such as `str(metrics)`.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    grouped = {prompt: [pair for pair in pairs if pair.prompt == prompt] for prompt in prompts}
    rows = [Row(p, (tuple(x.base for x in found), tuple(x.adapted for x in found))) for p, found in grouped.items()]
    across = 2 if len(pairs) == len(prompts) else 1
    if photos:
        more = f" ({shown} of {len(photos)})" if len(photos) > shown else ""
        rows.insert(0, Row(f"photos{more}", (tuple(photos[:shown]),)))
    return sheet(rows, title=title, note=note, columns=heads, footer=footer, cell=cell, across=across)


def fitted(picture: Image.Image, cell: int) -> Image.Image:
    """A picture scaled to fit a square, with Lanczos up and down: at 64 px to 192 px it reads better than bare pixels."""
    factor = cell / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _lines(rows: Sequence[Row], across: int) -> list[list[Row]]:
    """Rows that stand beside one another: neighbours of one form, at most `across`."""
    lines: list[list[Row]] = []
    for row in rows:
        if lines and len(lines[-1]) < across and _form(lines[-1][0]) == _form(row):
            lines[-1].append(row)
        else:
            lines.append([row])
    return lines


def _form(row: Row) -> list[int]:
    return [len(group) for group in row.groups]


def _across(line: Sequence[Row], cell: int) -> int:
    return len(line) * (_width(line[0], cell) + APART) - APART


def _width(row: Row, cell: int) -> int:
    pictures = sum(len(group) for group in row.groups)
    return pictures * (cell + GAP) - GAP * len(row.groups) + WIDE_GAP * (len(row.groups) - 1)


class _Page:
    """Grows downwards: pieces with their places, drawn at the end when the height is known."""

    def __init__(self, width: int) -> None:
        self.width, self.y = width, MARGIN
        self.pieces: list[tuple[int, int, Image.Image]] = []

    def text(self, words: str, size: int, colour: tuple[int, int, int], left: int = MARGIN, width: int | None = None) -> None:
        """Lines of text, wrapped at the page's width, or at one that is given."""
        if not words:
            return
        for line in printable(words).splitlines():
            for part in _wrapped(line, size, width or self.width - 2 * MARGIN):
                self.pieces.append((left, self.y, _written(part, size, colour)))
                self.y += int(size * 1.4)
        self.y += size // 2

    def labels(self, line: Sequence[Row], cell: int) -> None:
        """The label of each row; one that stands alone has the whole page's width."""
        top, low, wide = self.y, self.y, _width(line[0], cell)
        for left, row in zip(_lefts(line, cell), line, strict=True):
            self.y = top
            self.text(row.label, 16, INK, left, wide if len(line) > 1 else None)
            low = max(low, self.y)
        self.y = low

    def table(self, words: str, size: int, colour: tuple[int, int, int]) -> None:
        """Lines whose cells are set apart by two and more spaces, in columns; lines of one cell are plain text."""
        rows = [re.split(r"\s{2,}", line) for line in printable(words).splitlines()]
        table = [row for row in rows if len(row) > 1]
        columns = max((len(row) for row in table), default=0)
        widths = [max(_length(row[i], size) if i < len(row) else 0 for row in table) + 2 * size for i in range(columns)]
        for row in rows:
            if len(row) == 1:
                self.text(row[0], size, colour)
                continue
            for i, cell in enumerate(row):
                self.pieces.append((MARGIN + sum(widths[:i]), self.y, _written(cell, size, colour)))
            self.y += int(size * 1.5)

    def heads(self, line: Sequence[Row], columns: Sequence[str], cell: int) -> None:
        """Column heads over a rule, each as wide as its group."""
        self.y += 8
        for left, row in zip(_lefts(line, cell), line, strict=True):
            for x, width, word in zip(*_spans(row, cell, left), columns, strict=True):
                self.pieces.append((x, self.y, _written(_cut(printable(word), 18, width), 18, INK)))
                self.pieces.append((x, self.y + 28, Image.new("RGB", (width, 2), LINE)))
        self.y += 38

    def pictures(self, line: Sequence[Row], cell: int) -> None:
        """The groups of rows, side by side, all in places of one size; the line is as high as its highest picture."""
        high = 0
        for left, row in zip(_lefts(line, cell), line, strict=True):
            for x, group in zip(_spans(row, cell, left)[0], row.groups, strict=True):
                for i, picture in enumerate(group):
                    if picture is not None:
                        small = fitted(picture, cell)
                        self.pieces.append((x + i * (cell + GAP) + (cell - small.width) // 2, self.y, small))
                        high = max(high, small.height)
        self.y += high + 16

    def image(self) -> Image.Image:
        page = Image.new("RGB", (self.width, self.y + MARGIN // 2), PAPER)
        for x, y, piece in self.pieces:
            page.paste(piece, (x, y))
        return page


def _lefts(line: Sequence[Row], cell: int) -> list[int]:
    """Left edges of the rows of a line."""
    return [MARGIN + i * (_width(line[0], cell) + APART) for i in range(len(line))]


def _spans(row: Row, cell: int, x: int) -> tuple[list[int], list[int]]:
    """Left edges and widths of the groups of a row that begins at `x`."""
    lefts, widths = list[int](), list[int]()
    for group in row.groups:
        width = len(group) * (cell + GAP) - GAP
        lefts.append(x)
        widths.append(width)
        x += width + WIDE_GAP
    return lefts, widths


def _length(words: str, size: int) -> int:
    return int(font_for(words, size).getlength(words)) + 1


def _written(words: str, size: int, colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (max(1, _length(words, size)), int(size * 1.35)), PAPER)
    baseline = font_for("", size).getmetrics()[0]  # of fonts with other ascenders too
    ImageDraw.Draw(image).text((0, baseline), words, colour, font_for(words, size), anchor="ls")
    return image


def _cut(words: str, size: int, width: int) -> str:
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
            current = _cut(word, size, width)
    return [*lines, current]
