"""The support matrix: which method works on which host. `python -m veneer.testing.matrix` prints src/veneer/support_matrix.md."""

from __future__ import annotations

from typing import Any

from veneer.injection.host import Host
from veneer.injection.method import Method
from veneer.injection.registry import Registry, hosts, methods

from .case import usable_sites


def support_matrix() -> str:
    """A markdown table of veneer's methods and hosts, computed from needs and sites on the hosts' small models.

    ✓ if all small models of a host are supported, their names if some are, – if none is.
    """
    columns = [hosts.get(name)() for name in _own(hosts)]
    lines = ["| method | " + " | ".join(f"`{host.name}`" for host in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in _own(methods):
        method = methods.get(name).examples()[0]
        lines.append(f"| `{name}` | " + " | ".join(_cell(method, host) for host in columns) + " |")
    return "\n".join(lines)


def _own(registry: Registry[Any]) -> list[str]:
    return [name for name in registry.names() if registry.source(name) == "veneer"]


def _cell(method: Method, host: Host) -> str:
    models = list(host.tiny())
    fitting = [model for model in models if usable_sites(method, host, model)]
    return "✓" if fitting == models else ", ".join(fitting) or "–"


if __name__ == "__main__":
    print(support_matrix())
