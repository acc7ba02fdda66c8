"""Only who knows the cluster's secret is let in, and nobody in between can change what two nodes agree on."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from contextlib import asynccontextmanager, suppress

import pytest

from lamina.errors import ConfigError, ConnectError, HandshakeError
from lamina.transport import Address, Options, TlsFiles, connect
from tests.transport import wire
from tests.transport.conftest import make_certificate
from tests.transport.nodes import COMPUTE, TCP, listening, round_trip, still_welcomes

SECRET = b"what all nodes of a cluster know"
TRUSTING = Options("tcp", peer_timeout=10.0, secret=SECRET)
OTHER_SECRET = Options("tcp", peer_timeout=10.0, secret=SECRET[::-1])


async def refused(listener, options, words):
    """The connecting end hears why, at once, and does not try again."""
    with pytest.raises(HandshakeError, match=words):
        await connect(listener.address, COMPUTE, options, deadline_s=20)


# -- the secret


def test_same_secret(run):
    """Nodes with the same secret are linked, and a node by hand that knows it."""

    async def main():
        async with (
            listening(TRUSTING) as (listener, keeper),
            await connect(listener.address, COMPUTE, TRUSTING, deadline_s=10) as link,
            wire.hand_made_link(listener.address, SECRET),
        ):
            await keeper.until(2)
            assert await round_trip(link, keeper.links[0])

    run(main())


@pytest.mark.parametrize(
    ("near", "far", "words"),
    [
        (OTHER_SECRET, TRUSTING, "the peer does not know the cluster secret"),
        (TCP, TRUSTING, "the peer has a cluster secret and this end has none"),
        (TRUSTING, TCP, "this end has a cluster secret and the peer has none"),
    ],
    ids=["wrong", "missing here", "missing there"],
)
def test_different_secrets(run, near, far, words):
    """Both ends say what is wrong; those who have the right one are not disturbed."""

    async def main():
        async with listening(far) as (listener, keeper):
            await refused(listener, near, words)
            assert not keeper.links
            assert await still_welcomes(listener, keeper, far)

    run(main())


def test_listener_that_does_not_know_the_secret(run):
    """The proof is mutual: whoever answers at the address of a node, but cannot prove to be one, gets no link."""

    async def main():
        async def serve(peer):
            theirs = await peer.frame()
            mine = wire.message(wire.hello(secret=True))
            await peer.send(mine)
            await peer.hear()
            guess = wire.proof(b"a guess", b"listening", (theirs, mine))
            await peer.send(wire.message({"proof": guess, "link_id": bytes(16)}))

        async with wire.server(serve) as (port, accepted):
            with pytest.raises(HandshakeError, match="does not know the cluster secret"):
                await connect(Address("tcp", "127.0.0.1", port), COMPUTE, TRUSTING, deadline_s=20)
            assert len(accepted) == 1

    run(main())


def test_stranger_learns_no_proof(run):
    """The listening end proves nothing to who has not proved itself: there is nothing to try secrets on at home."""

    async def main():
        async with listening(TRUSTING) as (listener, _), wire.stranger(listener.address) as stranger:
            await stranger.send(wire.message(wire.hello(secret=True)))
            assert "proof" not in await stranger.hear()
            await stranger.send(wire.message({"proof": bytes(32)}))
            assert (await stranger.hear()).keys() == {"refused"}

    run(main())


@pytest.mark.parametrize("wrong", [None, b"", bytes(31), bytes(33), "text", 7, [1]])
def test_proof_of_another_shape(wrong):
    """Whatever stands in the place of a proof."""

    async def main():
        async with listening(TRUSTING) as (listener, keeper), wire.stranger(listener.address) as stranger:
            await stranger.send(wire.message(wire.hello(secret=True)))
            await stranger.hear()
            await stranger.send(wire.message({"proof": wrong}))
            assert "does not know the cluster secret" in (await stranger.hear())["refused"]
            assert not keeper.links

    asyncio.run(main())


def test_reflected(run):
    """An echo is no peer: a node's own hello and proof do not count when they come back."""

    async def main():
        async def echo(peer):
            while True:
                await peer.send(await peer.frame())

        async with wire.server(echo) as (port, accepted):
            with pytest.raises(HandshakeError, match="does not know the cluster secret"):
                await connect(Address("tcp", "127.0.0.1", port), COMPUTE, TRUSTING, deadline_s=20)
            assert len(accepted) == 1

    run(main())


def test_proof_from_another_connection(run):
    """Nor is the proof of one node good for another connection, to the same listener, at the same time.

    Whoever stands in between may pass on what both say, but not as the start of a conversation of its own.
    """

    async def main():
        async with listening(TRUSTING) as (listener, keeper), wire.stranger(listener.address) as second:
            mine = wire.message(wire.hello(secret=True))
            async with wire.stranger(listener.address, mine) as first:
                hellos = (mine, await first.frame())
                good = wire.message({"proof": wire.proof(SECRET, b"connecting", hellos)})
                await second.send(mine)
                await second.frame()
                await second.send(good)
                assert "does not know the cluster secret" in (await second.hear())["refused"]
                await first.send(good)
                assert "link_id" in await first.hear()
            assert not keeper.links

    run(main())


# -- somebody in between


def unchanged(frame):
    return frame


class Between:
    """A proxy that keeps, and may change, each frame in each direction of each connection."""

    def __init__(self, upwards=unchanged, downwards=unchanged):
        self.upwards = upwards
        self.downwards = downwards
        self.said = []
        """By connection: the frames of the connecting end, and those of the listening one."""
        self.port = 0

    @property
    def address(self):
        return Address("tcp", "127.0.0.1", self.port)

    @asynccontextmanager
    async def to(self, address):
        async def carry(source, sink, change, said):
            with suppress(EOFError, OSError):
                while True:
                    frame = change(await source.frame())
                    said.append(frame)
                    await sink.send(frame)
            with suppress(OSError):
                sink.sock.shutdown(2)

        async def serve(near):
            said = ([], [])
            self.said.append(said)
            async with wire.stranger(address) as far:
                await asyncio.gather(carry(near, far, self.upwards, said[0]), carry(far, near, self.downwards, said[1]))

        async with wire.server(serve) as (self.port, _):
            yield self


def changed(**changes):
    """Changes a hello, and nothing else."""

    def change(frame):
        content = wire.msgpack.unpackb(frame[wire.HEADER_BYTES :]) if frame[6] == wire.MESSAGE else {}
        return wire.message({**content, **changes}) if "nonce" in content else frame

    return change


def test_a_proxy_alone_does_no_harm(run):
    """What is passed on unchanged makes a link."""

    async def main():
        async with listening(TRUSTING) as (listener, keeper), Between().to(listener.address) as between:
            link = await connect(between.address, COMPUTE, TRUSTING, deadline_s=10)
            assert await round_trip(link, await keeper.first())
            link.abort("the test is over")

    run(main())


@pytest.mark.parametrize("direction", ["upwards", "downwards"])
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "tcp"},
        {"offers": {"tcp": {}}},
        {"offers": {"tcp": {}, "shm": {"missing": "out of order"}}},
        {"name": "another"},
        {"role": "client"},
        {"details": {"x": 1}},
        {"peer_timeout": 3600.0},
        {"nonce": bytes(32)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_changed_hello(direction, changes):
    """Nobody makes two nodes take a weaker transport than they could, nor changes anything else that they say."""
    auto = Options("auto", secret=SECRET)

    async def main():
        async with listening(auto) as (listener, keeper):
            between = Between(**{direction: changed(**changes)})
            async with between.to(listener.address):
                with pytest.raises(HandshakeError, match="does not know the cluster secret"):
                    await connect(between.address, COMPUTE, auto, deadline_s=20)
            assert not keeper.links

    asyncio.run(main())


@pytest.mark.parametrize("secret", [True, False])
def test_changed_claim_of_a_secret(secret):
    """Nor can the need of a proof be talked away."""
    options = TRUSTING if secret else TCP

    async def main():
        async with listening(options) as (listener, keeper):
            both = changed(secret=not secret)
            async with Between(both, both).to(listener.address) as between:
                with pytest.raises(HandshakeError, match="cluster secret"):
                    await connect(between.address, COMPUTE, options, deadline_s=20)
            assert not keeper.links

    asyncio.run(main())


def test_changed_hello_without_a_secret():
    """Then nobody is authenticated, but what was garbled on the way is noticed."""

    async def main():
        async with listening(TCP) as (listener, keeper):
            async with Between(changed(name="another")).to(listener.address) as between:
                with pytest.raises(HandshakeError, match="something on the path changes the connection"):
                    await connect(between.address, COMPUTE, TCP, deadline_s=20)
            assert not keeper.links

    asyncio.run(main())


def test_replayed_to_the_listener(run):
    """What a good node said before opens no door when it is said again: every listener has a new nonce."""

    async def main():
        async with listening(TRUSTING) as (listener, keeper), Between().to(listener.address) as between:
            link = await connect(between.address, COMPUTE, TRUSTING, deadline_s=10)
            await keeper.first()
            assert len(between.said) == 3  # a connection for control and one for each lane
            for connection in between.said:
                async with wire.stranger(listener.address, b"".join(connection[0])) as stranger:
                    answers = await stranger.rest()
                    assert b"refused" in answers
            assert len(keeper.links) == 1
            assert await round_trip(link, keeper.links[0])
            link.abort("the test is over")

    run(main())


def test_replayed_to_the_connecting_end(run):
    """Nor is a node that answers with what a listener once said."""

    async def main():
        async with listening(TRUSTING) as (listener, keeper), Between().to(listener.address) as between:
            link = await connect(between.address, COMPUTE, TRUSTING, deadline_s=10)
            await keeper.first()
            link.abort("the test is over")

        async def serve(peer):
            await peer.frame()
            await peer.send(b"".join(between.said[0][1]))

        async with wire.server(serve) as (port, _):
            with pytest.raises(HandshakeError, match="does not know the cluster secret"):
                await connect(Address("tcp", "127.0.0.1", port), COMPUTE, TRUSTING, deadline_s=20)

    run(main())


# -- further connections of a link


@pytest.mark.parametrize(
    "forge",
    [
        lambda link_id, key: wire.join(bytes(16), key, 0),
        lambda link_id, key: wire.join(link_id, bytes(32), 0),
        lambda link_id, key: wire.join(link_id, wire.hmac.digest(b"", link_id, "sha256"), 0),
        lambda link_id, key: wire.join(link_id, key, 0).replace(b"\xa4lane\x00", b"\xa4lane\x01"),
        lambda link_id, key: wire.join(link_id, key, 2),
        lambda link_id, key: wire.message({"join": link_id, "lane": 0}),
        lambda link_id, key: wire.message({"join": link_id.hex(), "lane": 0, "proof": bytes(32)}),
        lambda link_id, key: wire.message({"join": link_id, "lane": [0], "proof": bytes(32)}),
    ],
    ids=["id", "key", "no key", "proof of another lane", "no such lane", "no proof", "text", "list"],
)
def test_forged_join(forge):
    """Only both ends of a link can add a connection to it; a failed try does not disturb them."""

    async def main():
        async with listening(TRUSTING) as (listener, keeper), wire.stranger(listener.address) as control:
            link_id, key = await wire.introduce(control, SECRET)
            async with wire.stranger(listener.address, forge(link_id, key)) as forged:
                assert "refused" in await forged.hear()
            async with (
                wire.stranger(listener.address, wire.join(link_id, key, 1)) as bulk,
                wire.stranger(listener.address, wire.join(link_id, key, 0)) as decode,
            ):
                assert [await decode.hear(), await bulk.hear()] == [{"joined": 0}, {"joined": 1}]
                await control.send(wire.message({"outcome": ""}))
                await keeper.first()

    asyncio.run(main())


def test_lane_is_joined_once(run):
    """A second connection for a lane is refused, while the link is set up and afterwards."""

    async def main():
        async with listening(TRUSTING) as (listener, keeper), wire.stranger(listener.address) as control:
            link_id, key = await wire.introduce(control, SECRET)
            decode, bulk = (wire.join(link_id, key, lane) for lane in (0, 1))
            async with wire.stranger(listener.address, decode) as first:
                assert await first.hear() == {"joined": 0}
                async with wire.stranger(listener.address, decode) as second:
                    assert "has its connection already" in (await second.hear())["refused"]
                async with wire.stranger(listener.address, bulk) as third:
                    assert await third.hear() == {"joined": 1}
                    await control.send(wire.message({"outcome": ""}))
                    link = await keeper.first()
                    for late in (decode, bulk):
                        async with wire.stranger(listener.address, late) as fourth:
                            assert "no link waits" in (await fourth.hear())["refused"]
                    assert link.state.error is None

    run(main())


# -- TLS


def with_tls(files, secret=SECRET) -> Options:
    return Options("tcp", peer_timeout=10.0, secret=secret, tls=files)


@pytest.mark.parametrize("secret", [SECRET, None])
def test_tls(run, tls, secret):
    """Inside TLS all is as it is outside, with a secret and without."""

    async def main():
        options = with_tls(tls, secret)
        async with (
            listening(options) as (listener, keeper),
            await connect(listener.address, COMPUTE, options, deadline_s=10) as link,
        ):
            assert await round_trip(link, await keeper.first())

    run(main())


def test_tls_with_another_secret(run, tls):
    """A certificate does not stand in for the secret."""

    async def main():
        async with listening(with_tls(tls)) as (listener, keeper):
            await refused(listener, with_tls(tls, SECRET[::-1]), "the peer does not know the cluster secret")
            assert not keeper.links

    run(main())


@pytest.mark.parametrize("who", ["connecting", "listening"])
def test_certificate_of_another_authority(run, tls, tmp_path, who):
    """Neither end talks to a node whose certificate its authority did not sign, whatever else that knows."""
    foreign = make_certificate(tmp_path, "foreign")
    mixed = TlsFiles(foreign.certificate, foreign.key, tls.authority)  # it trusts the cluster, which does not trust it
    options = [with_tls(mixed), with_tls(tls)]

    async def main():
        near, far = options if who == "connecting" else options[::-1]
        async with listening(far) as (listener, keeper):
            await refused(listener, near, "TLS failed.*both ends need it, and one authority")
            assert not keeper.links

    run(main())


@pytest.mark.parametrize("who", ["connecting", "listening"])
def test_tls_on_one_side_only(run, tls, who):
    """The error says that it is TLS which is missing at one end."""

    async def main():
        near, far = (with_tls(tls), TRUSTING) if who == "connecting" else (TRUSTING, with_tls(tls))
        async with listening(far) as (listener, keeper):
            await refused(
                listener, near, "TLS failed: .*both ends need it" if near.tls else "this end uses TLS and the peer"
            )
            assert not keeper.links
            assert await still_welcomes(listener, keeper, far)

    run(main())


@asynccontextmanager
async def tls_proxy(address, files):
    """Ends the TLS of both sides with a certificate of its own, and passes on what is inside; gives its port."""

    async def serve(near_reader, near_writer):
        far_reader, far_writer = await asyncio.open_connection(
            address.host, address.port, ssl=files.context(connecting=True), server_hostname=""
        )

        async def carry(reader, writer):
            with suppress(OSError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            writer.close()

        await asyncio.gather(carry(near_reader, far_writer), carry(far_reader, near_writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=files.context(connecting=False))
    async with server:
        yield Address("tcp", "127.0.0.1", server.sockets[0].getsockname()[1])


def test_other_certificate_of_the_same_authority_in_between(tls):
    """Even a node with a good certificate cannot stand between two others: the proofs cover both certificates."""
    middle = make_certificate(tls.authority.parent, "middle")

    async def main():
        async with listening(with_tls(tls)) as (listener, keeper), tls_proxy(listener.address, middle) as between:
            with pytest.raises(HandshakeError, match="does not know the cluster secret"):
                await connect(between, COMPUTE, with_tls(tls), deadline_s=20)
            assert not keeper.links

    asyncio.run(main())


def test_tls_proxy_works(tls):
    """It would, where nobody compares: one certificate for all three."""

    async def main():
        options = with_tls(tls)
        async with (
            listening(options) as (listener, keeper),
            tls_proxy(listener.address, tls) as between,
            await connect(between, COMPUTE, options, deadline_s=20) as link,
        ):
            assert await round_trip(link, await keeper.first())

    asyncio.run(main())


def test_old_tls(tls):
    """Only TLS 1.3 is spoken."""

    async def main():
        async with listening(with_tls(tls)) as (listener, keeper):
            context = tls.context(connecting=True)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises(ssl.SSLError):
                await asyncio.open_connection(listener.address.host, listener.address.port, ssl=context)
            assert not keeper.links

    asyncio.run(main())


def test_stranger_stalls_in_tls(run, tls):
    """Whoever starts TLS and does not go on is dropped in time."""

    async def main():
        async with (
            listening(with_tls(tls), handshake_timeout=0.3) as (listener, keeper),
            wire.stranger(listener.address, bytes.fromhex("1603010200")) as stranger,
        ):
            assert await still_welcomes(listener, keeper, with_tls(tls))
            assert await stranger.rest() == b""

    run(main())


def test_tls_files_that_do_not_fit(tls, tmp_path):
    """What is wrong with the files is said before anything is opened."""
    other = make_certificate(tmp_path, "other")
    missing = tmp_path / "missing.pem"
    locked = tmp_path / "locked.key"
    encrypt = ["openssl", "pkey", "-in", tls.key, "-aes256", "-passout", "pass:word", "-out", locked]
    subprocess.run(encrypt, check=True)
    cases = {
        f"TLS key {locked} is encrypted": TlsFiles(tls.certificate, locked, tls.authority),
        f"TLS authority {missing} cannot be used: No such file": TlsFiles(tls.certificate, tls.key, missing),
        f"TLS certificate {missing} with key {tls.key} cannot be used": TlsFiles(missing, tls.key, tls.authority),
        f"TLS certificate {tls.certificate} with key {other.key} cannot": TlsFiles(
            tls.certificate, other.key, tls.authority
        ),
    }

    async def main():
        for words, files in cases.items():
            with pytest.raises(ConfigError, match=words):
                await connect(Address("tcp", "127.0.0.1", 1), COMPUTE, with_tls(files), deadline_s=1)
        with pytest.raises(ConnectError):
            await connect(Address("tcp", "127.0.0.1", 1), COMPUTE, with_tls(tls), deadline_s=0.1)

    asyncio.run(main())
