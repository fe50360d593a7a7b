"""The support matrix: which method works on which host. `python -m veneer.testing.matrix` prints src/veneer/support_matrix.md."""

from __future__ import annotations

from typing import Any

from veneer.injection.host import Host
from veneer.injection.method import Method
from veneer.injection.registry import Registry, hosts, methods

from .case import is_supported

MANY = 8
"""Number of small models above which a cell lists those without support, if they are fewer."""


def support_matrix() -> str:
    """A markdown table of veneer's methods and hosts, computed from needs and sites on the hosts' small models.

    ✓ if all small models of a host are supported, "all but" some if most of many are, the names of some, – if none is.
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
    fitting = [model for model in models if is_supported(method, host, model)]
    others = [model for model in models if model not in fitting]
    if len(models) > MANY and 0 < len(others) < len(fitting):
        return f"all but {', '.join(others)}"
    return "✓" if fitting == models else ", ".join(fitting) or "–"


if __name__ == "__main__":
    print(support_matrix())
