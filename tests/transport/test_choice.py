"""Which transport two nodes take, what they say about it, and what happens when it cannot be had."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from lamina.errors import ConfigError, ConnectError, HandshakeError, ProtocolError
from lamina.transport import Lane, LinkState, Options, Region, RemoteRegion, connect, endpoints, tcp
from lamina.transport.lanes import UpgradeError
from tests.transport import wire
from tests.transport.nodes import COMPUTE, TCP, listening, round_trip, still_welcomes

AUTO = Options("auto", peer_timeout=10.0)
ELSEWHERE = {"shm": {"host": "another host"}, "rdma": {"missing": "no adapter is plugged in"}, "tcp": {}}


async def link_of(near, far):
    """The choice of both ends of a link that was made between these options."""
    async with (
        listening(far) as (listener, keeper),
        await connect(listener.address, COMPUTE, near, deadline_s=10) as link,
    ):
        other = await keeper.first()
        assert await round_trip(link, other)
        assert link.info.choice == other.info.choice
        assert link.info.transport == other.info.transport
        return link.info.transport, link.info.choice


def test_auto_takes_shared_memory_on_one_host(run):
    """The best that both ends have, which is said with what was asked for."""
    transport, choice = run(link_of(AUTO, AUTO))

    assert transport == "shm"
    assert choice == "asked: auto (c0), auto (m0); took shm"  # nothing about rdma, which is worse on one host


@pytest.mark.parametrize("kind", ["tcp", "shm"])
@pytest.mark.parametrize("who", ["connecting", "listening"])
def test_one_end_decides(kind, who):
    """What one end demands, the other one takes when it has no preference."""
    demanded = Options(kind, peer_timeout=10.0)
    near, far = (demanded, AUTO) if who == "connecting" else (AUTO, demanded)
    transport, choice = asyncio.run(link_of(near, far))

    assert transport == kind
    assert choice == f"asked: {near.kind} (c0), {far.kind} (m0); took {kind}"


@pytest.mark.parametrize(("near", "far"), [("tcp", "shm"), ("shm", "tcp"), ("auto", "control"), ("tcp", "control")])
def test_different_demands(run, near, far):
    """Both demands are in the error, which both ends have; nobody tries again."""

    async def main():
        async with listening(Options(far)) as (listener, keeper):
            with pytest.raises(
                HandshakeError, match=f"c0 demands transport {near}, m0 demands {far}: configure one kind, or auto"
            ):
                await connect(listener.address, COMPUTE, Options(near), deadline_s=20)
            assert not keeper.links

    run(main())


@pytest.mark.parametrize("who", ["connecting", "listening"])
def test_what_is_demanded_and_missing(run, who, caplog):
    """Both ends say which step failed, and where; there is no silent fallback."""
    rdma = Options("rdma")

    async def main():
        near, far = (rdma, AUTO) if who == "connecting" else (AUTO, rdma)
        async with listening(far) as (listener, keeper):
            try:
                link = await connect(listener.address, COMPUTE, near, deadline_s=20)
            except HandshakeError as error:
                while "no transport is possible" not in caplog.text:  # noqa: ASYNC110 - the other end says it, too
                    await asyncio.sleep(0.01)
                return str(error), keeper.links
            link.abort("the test is over")
            pytest.skip("there is RDMA here")

    error, links = run(main())
    assert not links
    assert f"no transport is possible (asked: {'rdma' if who == 'connecting' else 'auto'} (c0)" in error
    assert "; rdma: " in error or ": rdma: " in error
    assert "not offered" not in error


def test_a_listener_says_at_once_what_it_lacks(run, caplog):
    """Whoever starts a node that can never serve what it demands learns it from that node's own log, at its start."""

    async def main():
        async with listening(Options("rdma")):
            pass

    with caplog.at_level("ERROR", "lamina.transport"):
        run(main())
    if any(Path("/sys/class/infiniband").glob("*")):
        pytest.skip("there is RDMA here")
    assert "event=transport_missing" in caplog.text
    assert "kind=rdma" in caplog.text


def test_demanded_but_the_peer_has_none():
    """The reason is the peer's own."""

    async def main():
        async with listening(Options("rdma")) as (listener, keeper):
            async with wire.stranger(listener.address) as stranger:
                await wire.introduce(stranger, kind="auto", offers=ELSEWHERE)
                refusal = (await stranger.hear())["refused"]
            assert not keeper.links
            return refusal

    refusal = asyncio.run(main())
    assert "no transport is possible (asked: auto (stranger), rdma (m0)): rdma: " in refusal


def test_auto_falls_back_to_what_is_possible(run):
    """Why the better ones were not taken can be read from the link."""

    async def main():
        async with (
            listening(AUTO) as (listener, keeper),
            wire.hand_made_link(listener.address, kind="auto", offers=ELSEWHERE),
        ):
            return (await keeper.first()).info.choice

    assert run(main()) == (
        "asked: auto (stranger), auto (m0); shm: the nodes are not on one host; "
        "rdma: stranger: no adapter is plugged in; took tcp"
    )


def test_auto_falls_back_when_a_set_up_fails(run):
    """What looked possible and was not costs a moment; the reason of the end where it failed is kept."""

    async def main():
        async with listening(AUTO) as (listener, keeper):
            offers = await wire.offers_of(listener.address)
            async with wire.stranger(listener.address) as control:
                link_id, key = await wire.introduce(control, kind="auto", offers={**offers, "tcp": {}, "rdma": {}})
                assert "socket" in await control.hear()
                await control.send(wire.message({"outcome": "no memory\nis left"}))
                assert "no memory" in (await control.hear())["outcome"]
                async with (
                    wire.stranger(listener.address, wire.join(link_id, key, 0)) as decode,
                    wire.stranger(listener.address, wire.join(link_id, key, 1)) as bulk,
                ):
                    assert [await decode.hear(), await bulk.hear()] == [{"joined": 0}, {"joined": 1}]
                    assert await control.hear() == {"outcome": ""}
                    await control.send(wire.message({"outcome": ""}))
                    link = await keeper.first()
                    return link.info.transport, link.info.choice

    transport, choice = run(main())
    assert transport == "tcp"
    assert "shm: stranger: no memory" in choice
    assert choice.endswith("; took tcp")
    assert choice.isprintable()


def test_words_of_the_peer_are_fit_for_a_log(run):
    """What a peer says about itself stays on its line, and short."""

    async def main():
        offers = {"shm": {"missing": "x\nevent=all_is_well" + "y" * 5000}, "rdma": {"missing": 7}, "tcp": {}}
        async with (
            listening(AUTO) as (listener, keeper),
            wire.hand_made_link(listener.address, kind="auto", offers=offers),
        ):
            return (await keeper.first()).info.choice

    choice = run(main())
    assert choice.isprintable()
    assert len(choice) < 1500


@pytest.mark.parametrize("kind", [pytest.param("tcp", marks=pytest.mark.slow), "shm"])
def test_demanded_and_its_set_up_fails(kind):
    """There is no fallback from what was demanded: the handshake ends with the reason of the other end."""

    async def main():
        async with listening(Options(kind)) as (listener, keeper):
            offers = await wire.offers_of(listener.address)
            async with wire.stranger(listener.address) as control:
                await wire.introduce(control, kind="auto", offers=offers)
                await control.send(wire.message({"outcome": "it is broken"}))
                while "refused" not in (answer := await control.hear()):
                    pass
            assert not keeper.links
            assert await still_welcomes(listener, keeper, Options(kind))
            return answer["refused"]

    refusal = asyncio.run(main())
    assert f"no transport could be set up: asked: auto (stranger), {kind} (m0); {kind}: " in refusal
    assert "it is broken" in refusal


@pytest.mark.parametrize("times", [1, None])
def test_a_set_up_that_fails_is_tried_again(times, run, monkeypatch, caplog):
    """A slow machine or a busy port passes; what does not pass is said in the end, and at once in the log."""
    upgrade, tried = tcp.upgrade, Counter()

    async def fails(session):
        tried[session.connecting] += 1
        if times is None or tried[session.connecting] <= times:
            raise UpgradeError("the port is busy")
        return await upgrade(session)

    monkeypatch.setattr(tcp, "upgrade", fails)

    async def main():
        async with (
            listening(TCP) as (listener, keeper),
            await connect(listener.address, COMPUTE, TCP, deadline_s=10 if times else 1) as link,
        ):
            return await round_trip(link, await keeper.first())

    if times:
        assert run(main())
    else:
        with pytest.raises(ConnectError, match=r"no link within 1 s, last attempt: no transport could .*port is busy"):
            run(main())
    assert sum("event=set_up_failed" in message and "busy" in message for message in caplog.messages) == 1


@pytest.mark.slow
@pytest.mark.parametrize("silent_from", ["set-up", "outcome"])
def test_peer_that_falls_silent_in_a_set_up(silent_from):
    """The listener does not wait for ever, and the connection ends with the reason."""

    async def main():
        async with listening(Options("auto", peer_timeout=1.0)) as (listener, keeper):
            offers = await wire.offers_of(listener.address)
            async with wire.stranger(listener.address) as control:
                await wire.introduce(control, kind="shm", offers=offers)
                if silent_from == "outcome":
                    await control.send(wire.message({"outcome": "it is broken"}))
                assert b"refused" in await control.rest()
            assert not keeper.links

    asyncio.run(main())


# -- links that only carry messages


def test_control_link(run):
    """It carries messages, and says what it is to whoever wants more of it."""

    async def main():
        async with (
            listening(AUTO) as (listener, keeper),
            await connect(listener.address, COMPUTE, Options("control", peer_timeout=10.0), deadline_s=10) as link,
        ):
            other = await keeper.first()
            assert link.info.transport == other.info.transport == "control"
            assert link.info.choice == other.info.choice == "asked: control (c0), auto (m0); took control"
            assert await round_trip(link, other)
            remote = RemoteRegion(1, "inbox", 100)
            for end in (link, other):
                with pytest.raises(ConfigError, match="only carries messages: it was made with kind 'control'"):
                    end.expose(Region("inbox", 100))
                with pytest.raises(ProtocolError, match="has exposed no region 'inbox' of 100 bytes"):
                    end.write(Lane.DECODE, remote, 0, [b"data"], 1)
                with pytest.raises(ProtocolError, match="has exposed no region 'inbox' of 100 bytes"):
                    end.window(remote)
                assert end.state == LinkState(
                    closed=False, error=None, pending_bytes=0, bytes_written=(0, 0), bytes_received=(0, 0)
                )
            await link.close()
            assert link.state.error is None

    run(main())


def test_control_link_to_any_listener():
    """Whatever a listener demands of links with lanes."""

    async def main():
        for far in (TCP, Options("shm"), Options("rdma"), Options("control")):
            async with (
                listening(far) as (listener, keeper),
                await connect(listener.address, COMPUTE, Options("control"), deadline_s=10) as link,
            ):
                assert await round_trip(link, await keeper.first())

    asyncio.run(main())


def test_region_on_a_control_link():
    """A peer that exposes a region there breaks the protocol."""

    async def main():
        async with listening(AUTO) as (listener, keeper), wire.stranger(listener.address) as control:
            await wire.introduce(control, kind="control", offers={})
            link = await keeper.first()
            lost = asyncio.get_running_loop().create_future()
            link.deliver(on_lost=lost.set_result)
            await control.send(wire.note({"region": [1, 100, {}]}))
            assert "exposed a region on a link without lanes" in str(await lost)

    asyncio.run(main())


@pytest.mark.parametrize(("peer_timeout", "made"), [(0.2, False), (20.0, True)])
def test_setting_up_takes_as_long_as_silent_peers_are_given(run, monkeypatch, peer_timeout, made):
    """Where a cluster is slow, ``peer_timeout`` says so, and nothing has to be set for the set-up beside it."""

    async def slow(session):
        await asyncio.sleep(1)
        return await upgrade(session)

    upgrade = tcp.upgrade
    monkeypatch.setattr(tcp, "upgrade", slow)
    monkeypatch.setattr(endpoints, "UPGRADE_TIMEOUT", 0.3)
    options = Options("tcp", peer_timeout=peer_timeout)

    async def main():
        async with listening(options) as (listener, keeper):
            if not made:
                with pytest.raises(ConnectError, match=r"setting up tcp took longer than 0\.3 s"):
                    await connect(listener.address, COMPUTE, options, deadline_s=1)
                return
            async with await connect(listener.address, COMPUTE, options, deadline_s=10) as link:
                assert await round_trip(link, await keeper.first())

    run(main())
