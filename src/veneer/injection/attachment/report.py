"""What an attachment covers: per block the roles, trainable parameters, and where coverage is uneven."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..composition.merge import host_tensors

if TYPE_CHECKING:
    from ..sites import Site
    from .attachment import Attachment

Block = tuple[str, str, str]


@dataclass(frozen=True)
class Row:
    """One block, or one level outside its blocks (`block` is empty): what is adapted, which of the selected roles it lacks.

    `trainable` is without what all sites share.
    """

    tower: str
    stage: str
    block: str
    roles: tuple[str, ...]
    lacking: tuple[str, ...]
    trainable: int


@dataclass(frozen=True)
class Report:
    """Coverage and cost of an attachment.

    Attributes:
        inert: names of adapted sites whose effect the architecture cancels or drops; trained for nothing.
        rows: one a block, in the model's order; blocks and levels that offer the method a site and got none are listed too.
        summary: the method's own line about its adapters as they are now, such as the ranks that are left.
        sites, trainable, stored: counts; `stored` is the number of saved values.
        base: parameters of the touched towers without adapters.
    """

    name: str
    method: str
    rows: tuple[Row, ...]
    sites: int
    trainable: int
    stored: int
    base: int
    inert: tuple[str, ...] = ()
    summary: str = ""

    @property
    def uneven(self) -> tuple[Row, ...]:
        """Blocks that lack a role which other blocks of their tower have."""
        return tuple(r for r in self.rows if r.lacking)

    @classmethod
    def of(cls, attachment: Attachment) -> Report:
        """Look at an attachment."""
        blocks: dict[Block, list[tuple[Site, int]]] = {}
        for site in attachment.offered:
            if site.depth is not None or site.stage:
                blocks.setdefault(_block(site), [])
        for site, adapter in attachment.parts.values():
            count = sum(p.numel() for name, p in adapter.named_parameters() if not name.startswith("shared."))
            blocks.setdefault(_block(site), []).append((site, count))
        roles: dict[str, set[str]] = {}
        for site, _ in attachment.parts.values():
            if site.depth is not None:
                roles.setdefault(site.tower, set()).add(site.role)
        covered = {block[:2] for block, found in blocks.items() if found}
        shown = {b: found for b, found in blocks.items() if found or (b[0] in roles and (b[2] or b[:2] not in covered))}
        rows = tuple(_row(block, found, roles) for block, found in shown.items())
        return cls(
            name=attachment.name,
            method=attachment.method.name,
            rows=rows,
            sites=len(attachment.parts),
            trainable=sum(p.numel() for p in attachment.parameters() if p.requires_grad),
            stored=sum({t.untyped_storage()._cdata: t.numel() for t in attachment.state_dict().values()}.values()),
            base=sum(t.numel() for tower in attachment.towers.values() for _, t in host_tensors(tower)),
            inert=tuple(site.name for site, _ in attachment.parts.values() if site.inert),
            summary=attachment.method.summary(list(attachment.parts.values())),
        )

    def __str__(self) -> str:
        table = [("tower", "stage", "block", "roles", "trainable", "lacking")]
        table += [(r.tower, r.stage, r.block, " ".join(r.roles), f"{r.trainable:,}", " ".join(r.lacking)) for r in self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        share = 100 * self.trainable / self.base if self.base else 0.0
        lines.append(
            f"{self.name} ({self.method}): {self.sites} sites, {self.trainable:,} trainable = {share:.3f} % of {self.base:,}, "
            f"{self.stored:,} values stored"
        )
        if self.uneven:
            lines.append(f"uneven: {len(self.uneven)} of {len(self.rows)} blocks lack a role that others have (column 'lacking')")
        if self.inert:
            lines.append(f"inert: {len(self.inert)} sites have no effect by the host's design: {', '.join(self.inert[:3])}"[:160])
        return "\n".join([*lines, self.summary] if self.summary else lines)


def _block(site: Site) -> Block:
    return (site.tower, site.stage or "", "" if site.depth is None else str(site.depth))


def _row(block: Block, found: list[tuple[Site, int]], roles: dict[str, set[str]]) -> Row:
    tower, stage, depth = block
    here = {site.role for site, _ in found}
    lacking = sorted(roles.get(tower, set()) - here) if depth or not found else []
    return Row(tower, stage, depth, tuple(sorted(here)), tuple(lacking), sum(n for _, n in found))
