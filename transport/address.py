"""The address at which a node listens: ``tcp://host:port``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from lamina.errors import ConfigError

SCHEMES = ("tcp",)

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,252}[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Address:
    """A scheme, a host and a port. Port 0 lets a listener take any free one. ``str`` gives the text back.

    >>> str(Address.parse("127.0.0.1:7101"))
    'tcp://127.0.0.1:7101'
    >>> Address.parse("tcp://[::1]:7101").host
    '::1'
    """

    scheme: str
    host: str
    port: int

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ConfigError(f"unknown scheme {self.scheme!r} in an address: known are {', '.join(SCHEMES)}")
        if not (_NAME.fullmatch(self.host) or _is_ipv6(self.host)):
            raise ConfigError(f"{self.host!r} is neither a host name nor an IP address")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} of host {self.host} is outside 0..65535")

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``scheme://host:port``, or ``host:port`` for tcp. Raises ConfigError with a hint."""
        scheme, _, place = text.partition("://") if "://" in text else ("tcp", "", text)
        host, colon, port = place.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            if not _is_ipv6(host):
                raise ConfigError(f"{text!r}: only an IPv6 address stands in brackets, as in tcp://[::1]:7101")
        elif ":" in host or place.endswith("]"):
            raise ConfigError(f"{text!r}: an IPv6 address needs brackets and a port, as in tcp://[::1]:7101")
        if not colon:
            raise ConfigError(f"{text!r}: the port is missing, as in tcp://127.0.0.1:7101")
        if not re.fullmatch(r"[0-9]{1,5}", port):
            raise ConfigError(f"{text!r}: the port {port!r} is not a number from 0 to 65535")
        return cls(scheme, host, int(port))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether the address cannot leave this machine."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


def check_reach(address: Address, *, secret: bool) -> None:
    """Raise ConfigError for an address that other machines can reach although no secret authenticates them."""
    if not (secret or address.is_loopback):
        raise ConfigError(
            f"{address} is not a loopback address: without a cluster secret only loopback addresses are allowed; "
            "make a secret file, the same for all nodes and clients"
        )


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return True
