"""Addresses: what is read, what is refused, and with which hint."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import ConfigError
from lamina.transport import Address
from lamina.transport.address import check_reach


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("tcp://127.0.0.1:7101", "127.0.0.1", 7101),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("localhost:65535", "localhost", 65535),
        ("[::1]:7101", "::1", 7101),
        ("tcp://[::1]:7101", "::1", 7101),
        ("tcp://node-3.rack_1.example:7101", "node-3.rack_1.example", 7101),
    ],
)
def test_parse(text, host, port):
    """All usual ways to write an address are read."""
    assert Address.parse(text) == Address("tcp", host, port)


relaxed = settings(deadline=None)  # other tests may have the machine
names = st.text("az09", min_size=1, max_size=10)
hosts = st.ip_addresses().map(str) | st.lists(names, min_size=1, max_size=4).map(".".join)


@relaxed
@given(hosts, st.integers(0, 65535))
def test_round_trip(host, port):
    """``str`` gives back what ``parse`` reads."""
    address = Address("tcp", host, port)

    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "the port is missing"),
        ("127.0.0.1", "the port is missing"),
        ("127.0.0.1:", "not a number"),
        ("127.0.0.1:http", "not a number"),
        ("127.0.0.1:٣", "not a number"),
        ("127.0.0.1:-1", "not a number"),
        ("127.0.0.1:65536", "outside 0..65535"),
        ("127.0.0.1:" + "9" * 5000, "not a number"),
        ("::1", "needs brackets"),
        ("::1:7101", "needs brackets"),
        ("[::1]", "needs brackets and a port"),
        ("[localhost]:7101", "only an IPv6 address stands in brackets"),
        (":7101", "neither a host name nor an IP address"),
        ("two words:7101", "neither a host name nor an IP address"),
        ("a/b:7101", "neither a host name nor an IP address"),
        ("verbs://127.0.0.1:7101", "known are tcp"),
        ("://127.0.0.1:7101", "known are tcp"),
    ],
)
def test_refused(text, hint):
    """Every mistake is answered with what would be right."""
    with pytest.raises(ConfigError, match=hint):
        Address.parse(text)


HERE = ("127.0.0.1", "127.8.9.1", "localhost", "LOCALHOST", "::1")
ELSEWHERE = ("0.0.0.0", "10.0.0.1", "::", "localhost.example", "127.example", "::ffff:10.0.0.1")  # noqa: S104


@pytest.mark.parametrize("host", HERE)
def test_loopback(host):
    """What stays on this machine is allowed without a secret."""
    check_reach(Address("tcp", host, 7101), secret=False)


@pytest.mark.parametrize("host", ELSEWHERE)
def test_not_loopback(host):
    """What others could reach is refused where nobody proves who they are."""
    address = Address("tcp", host, 7101)
    with pytest.raises(ConfigError, match="without a cluster secret only loopback addresses are allowed"):
        check_reach(address, secret=False)


@pytest.mark.parametrize("host", HERE + ELSEWHERE)
def test_with_a_secret(host):
    """Those who prove that they know the secret may be anywhere."""
    check_reach(Address("tcp", host, 7101), secret=True)
