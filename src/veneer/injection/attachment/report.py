"""Report of an attachment: adapted roles and trainable parameters per block, and roles that blocks miss."""

from __future__ import annotations

from dataclasses import dataclass

from ..composition.merge import host_tensors
from ..sites import Site
from .protocol import AttachmentProtocol

Block = tuple[str, str, str]


@dataclass(frozen=True)
class Row:
    """Adapted roles of one block, or of one level outside its blocks (`block` is empty).

    Attributes:
        missing_roles: roles that are adapted in other blocks of the tower, but not in this one.
        trainable: trainable parameters, without those that all sites share.
    """

    tower: str
    stage: str
    block: str
    roles: tuple[str, ...]
    missing_roles: tuple[str, ...]
    trainable: int


@dataclass(frozen=True)
class Report:
    """Coverage and cost of an attachment.

    Attributes:
        rows: one per block, in the model's order, also of blocks and levels with supported sites but no adapter.
        sites, trainable, stored: number of adapted sites, of trainable parameters and of saved parameters.
        base: parameters of the adapted towers without adapters.
        inert: names of adapted sites whose output the architecture cancels or drops, so that training them has no effect.
        summary: the method's line about its adapters at present, such as their remaining ranks.
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
        """Blocks that miss a role which other blocks of their tower have."""
        return tuple(r for r in self.rows if r.missing_roles)

    @classmethod
    def of(cls, attachment: AttachmentProtocol) -> Report:
        """The report of an attachment."""
        blocks: dict[Block, list[tuple[Site, int]]] = {}
        for site in attachment.supported_sites:
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
        listed = {b: found for b, found in blocks.items() if found or (b[0] in roles and (b[2] or b[:2] not in covered))}
        rows = tuple(_row(block, found, roles) for block, found in listed.items())
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
        table = [("tower", "stage", "block", "roles", "trainable", "missing roles")]
        table += [
            (r.tower, r.stage, r.block, " ".join(r.roles), f"{r.trainable:,}", " ".join(r.missing_roles)) for r in self.rows
        ]
        widths = [max(len(row[i]) for row in table) for i in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        share = 100 * self.trainable / self.base if self.base else 0.0
        lines.append(
            f"{self.name} ({self.method}): {self.sites} sites, {self.trainable:,} trainable parameters = {share:.3f} % of "
            f"{self.base:,}, {self.stored:,} saved"
        )
        if self.uneven:
            lines.append(f"uneven: {len(self.uneven)} of {len(self.rows)} blocks miss a role that others have")
        if self.inert:
            lines.append(
                f"inert: {len(self.inert)} sites have no effect on the output of this architecture: {', '.join(self.inert[:3])}"[
                    :160
                ]
            )
        return "\n".join([*lines, self.summary] if self.summary else lines)


def _block(site: Site) -> Block:
    return (site.tower, site.stage or "", "" if site.depth is None else str(site.depth))


def _row(block: Block, found: list[tuple[Site, int]], roles: dict[str, set[str]]) -> Row:
    tower, stage, depth = block
    here = {site.role for site, _ in found}
    missing = sorted(roles.get(tower, set()) - here) if depth or not found else []
    return Row(tower, stage, depth, tuple(sorted(here)), tuple(missing), sum(n for _, n in found))
