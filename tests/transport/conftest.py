"""Both event loops, and links of every kind on this machine."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from lamina.transport import Address, Hello, Link, Listener, Options, TlsFiles, connect

Run = Callable[[Coroutine[Any, Any, Any]], Any]

LOCAL = Address.parse("127.0.0.1:0")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine to its end, on each kind of loop."""
    if request.param == "asyncio":
        return asyncio.run
    return pytest.importorskip("uvloop").run


KINDS = ("tcp", "tls", "shm")


@pytest.fixture(params=KINDS)
def options(request: pytest.FixtureRequest) -> Options:
    """Of both ends, for each way to move bytes on this machine; ``tls`` is tcp inside TLS, with a secret."""
    if request.param == "tls":
        return Options(kind="tcp", peer_timeout=10.0, secret=b"0123456789abcdef", tls=request.getfixturevalue("tls"))
    return Options(kind=request.param, peer_timeout=10.0)


@pytest.fixture
def make_pair(options: Options) -> Callable[[], Coroutine[Any, Any, tuple[Link, Link]]]:
    async def make_pair() -> tuple[Link, Link]:
        accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        hello = Hello("memory", "m0", {"heads": [0, 4]})
        async with await Listener.open(LOCAL, hello, accepted.set_result, options) as listener:
            link = await connect(listener.address, Hello("compute", "c0"), options, deadline_s=10.0)
            return link, await accepted

    return make_pair


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """A certificate and its authority; all nodes of a test share it."""
    return make_certificate(tmp_path_factory.mktemp("tls"), "node")


def make_certificate(folder: Path, name: str) -> TlsFiles:
    """A new certificate of the authority in ``folder``, which is made with the first one."""
    authority, authority_key = folder / "authority.pem", folder / "authority.key"
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    new = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    if not authority.exists():
        openssl("req", *new, "-subj", "/CN=authority", "-keyout", str(authority_key), "-out", str(authority))
    signed = ["-CA", str(authority), "-CAkey", str(authority_key), "-addext", "basicConstraints=critical,CA:FALSE"]
    openssl("req", *new, *signed, "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(certificate))
    return TlsFiles(certificate, key, authority)


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)  # noqa: S607
