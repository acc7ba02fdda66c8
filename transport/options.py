"""The options of one end for its links."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from lamina.errors import ConfigError

KINDS = ("auto", "rdma", "shm", "tcp", "control")
"""``auto`` takes shm on one host, else rdma, else tcp. ``control`` is for links that only carry messages."""

DEFAULT_PEER_TIMEOUT = 2.0
MIN_PEER_TIMEOUT = 0.05
MAX_PEER_TIMEOUT = 3600.0

MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 4096

MTUS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class TlsFiles:
    """Files in PEM format: this node's certificate and key, and the authority that signs those of all nodes."""

    certificate: Path
    key: Path
    authority: Path

    def context(self, *, connecting: bool) -> ssl.SSLContext:
        """Make the context for one side of a connection; both sides must show a certificate.

        Names in certificates are not compared with addresses: the authority is the cluster's own, and the proof of
        the secret covers both certificates. Raises ConfigError for a file that does not fit.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if connecting else ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(self.authority)
        except (OSError, ValueError) as error:
            raise ConfigError(f"TLS authority {self.authority} cannot be used: {_words(error)}") from error
        try:
            context.load_cert_chain(self.certificate, self.key, self._no_password)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"TLS certificate {self.certificate} with key {self.key} cannot be used: {_words(error)}"
            ) from error
        return context

    def _no_password(self) -> str:
        """Refuse an encrypted key: OpenSSL would ask on the terminal, where a node in the background has no answer."""
        raise ConfigError(
            f"TLS key {self.key} is encrypted; decrypt it (openssl pkey -in KEY -out NEW), for its owner alone to read"
        )

    def certificate_bytes(self) -> bytes:
        """Read this node's own certificate, in DER, as its peers see it."""
        text = self.certificate.read_text(errors="replace")  # the text around it may be in any encoding
        first, last = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
        if first not in text:
            raise ConfigError(f"TLS certificate {self.certificate} has no line {first!r}; write it in PEM again")
        return ssl.PEM_cert_to_DER_cert(text[text.index(first) : text.index(last) + len(last)])


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@dataclass(frozen=True)
class RdmaOptions:
    """Which port to use, and how. None takes the first active port, and on RoCE v2 the GID of an IPv4 address."""

    device: str | None = None
    port: int | None = None
    gid_index: int | None = None
    mtu: int | None = None
    """In bytes, one of ``MTUS``. None takes the smaller of both ports' active MTU."""
    queue: int = 1024
    """The number of writes that may be in flight on a lane, and of receives posted for the peer's writes."""

    def __post_init__(self) -> None:
        if self.mtu is not None and self.mtu not in MTUS:
            raise ConfigError(f"rdma: mtu must be one of {', '.join(map(str, MTUS))}, got {self.mtu}")
        if not 16 <= self.queue <= 16384:
            raise ConfigError(f"rdma: queue must be 16 to 16384, got {self.queue}")


@dataclass(frozen=True)
class Options:
    """The options of ``connect`` and ``Listener.open``. Both ends must agree on secret and TLS."""

    kind: str = "auto"
    """One of ``KINDS``. A kind that is not possible is an error; ``auto`` takes one that is."""
    peer_timeout: float = DEFAULT_PEER_TIMEOUT
    """The silence of the peer, in seconds, that ends a link. Setting up its transport may take as long, or 4 s."""
    secret: bytes | None = field(default=None, repr=False)
    """The cluster's secret, which only its nodes and clients know. Without one, only loopback addresses are allowed."""
    tls: TlsFiles | None = None
    """Encrypt the control connection, and lanes over tcp."""
    busy_poll: bool = False
    """Let the loop look for arrivals all the time instead of sleeping. Answers are faster, for a whole processor."""
    rdma: RdmaOptions = RdmaOptions()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind of transport must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not MIN_PEER_TIMEOUT <= self.peer_timeout <= MAX_PEER_TIMEOUT:
            raise ConfigError(
                f"peer_timeout must be {MIN_PEER_TIMEOUT:g} to {MAX_PEER_TIMEOUT:g} s, got {self.peer_timeout:g}"
            )
        if self.secret is not None and not MIN_SECRET_BYTES <= len(self.secret) <= MAX_SECRET_BYTES:
            raise ConfigError(
                f"a cluster secret must have {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, got {len(self.secret)}"
            )
