"""What this machine is called, by itself and by others."""

from __future__ import annotations

import ipaddress
import socket

__all__ = ["ANYWHERE", "household", "is_loopback", "own_names", "reachable"]

ANYWHERE = ("", "0.0.0.0", "::")
"""Listening there is listening on every address that the machine has."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reachable(host: str) -> str:
    """What to write into a link to a server that listens on ``host``."""
    if host in ANYWHERE:
        host = _address() or "localhost"
    return f"[{host}]" if ":" in host else host


def own_names(host: str) -> list[str]:
    """Names and addresses by which a server that listens on ``host`` can be called, as far as this machine knows."""
    names = ["localhost", "127.0.0.1", "::1"]
    if not is_loopback(host):
        here = socket.gethostname().lower()
        names += [here, here.partition(".")[0], f"{here.partition('.')[0]}.local"]
    names.append(_address() if host in ANYWHERE else host.lower())
    return [name for name in dict.fromkeys(names) if name.isascii() and 0 < len(name) <= 253]


def household(address: str) -> str:
    """What counts as one client: an IPv4 address, or the network of 64 bits that an IPv6 client has for itself."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))


def _address() -> str:
    """The address by which other machines reach this one; empty if there is none. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of documentation: only the route to it is asked for
        except OSError:
            return ""
        return str(probe.getsockname()[0])
