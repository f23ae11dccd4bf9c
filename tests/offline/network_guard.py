"""No test reaches the network: whatever connects, sends or asks for an address beyond this machine is refused.

Imported by `conftest.py`, and through `sitecustomize.py` by every Python that a test starts (this folder is on its
PYTHONPATH). An audit hook sees all of Python's sockets, whoever opens them, and cannot be taken off again. What runs in
other languages (gloo, Chromium) is not seen here; it connects to this machine alone.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import sys
from typing import Any

REFUSED: list[str] = []
"""What was refused in this process; a fixture fails the test that a new entry appears in, whatever caught the error."""


def is_local(host: Any) -> bool:
    """Whether an address (name, number, bytes or None, as sockets take them) means this machine."""
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or is_own(address)


@functools.cache
def is_own(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an interface of this machine has the address (Ray uses such a one): only there can be bound to it."""
    if address.is_unspecified or address.is_multicast:
        return False
    with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]  # (host, port, ...) of the internet's families, a path of AF_UNIX's, None: connected
        internet = isinstance(address, tuple) and isinstance(address[0], str | bytes)
        host = address[0] if internet else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if not is_local(host):
        REFUSED.append(f"{event} {host}")
        raise RuntimeError(f"the tests are offline: {event} to {host!r} is refused")


sys.addaudithook(refuse)
