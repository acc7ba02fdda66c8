"""What a trace shows of a cluster at work: operations, waits, the wire, requests, and the arrows between them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lamina.config import NodeConfig, PipelineConfig
from lamina.errors import ConfigError, LaminaError
from lamina.files import check_target
from lamina.ops.perfetto import chrome
from lamina.ops.trace import write
from lamina.recording import Trace, record
from lamina.runtime.spans import Place
from lamina.sim.world import World
from tests.sim.clusters import LINK, SECONDS, make_config, new_cluster

LAYERS, TOKENS, PROMPT = 4, 6, 40
RECORD_S = 1.0
US = 1e6


class Shown(NamedTuple):
    """A slice as a reader sees it: where it is, its name, its times in microseconds and its arguments."""

    process: str
    thread: str
    name: str
    start: float
    end: float
    args: dict[str, Any]


class Viewer:
    """Reads an object in the format of trace viewers as a viewer does: names of tracks, slices, and arrows."""

    def __init__(self, converted: dict[str, Any]) -> None:
        events = converted["traceEvents"]
        named = [e for e in events if e["ph"] == "M"]
        self._processes = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name"}
        self._threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in named if e["name"] == "thread_name"}
        self.slices = [
            Shown(*self._track(e), e["name"], e["ts"], round(e["ts"] + e["dur"], 3), e["args"])
            for e in events
            if e["ph"] == "X"
        ]
        points: dict[int, list[dict[str, Any]]] = {}
        for event in events:
            if event["ph"] in "stf":
                points.setdefault(event["id"], []).append(event)
        self.arrows = [[self._slice_at(e) for e in arrow] for arrow in points.values()]
        assert all([e["ph"] for e in arrow] == ["s", "t", "f"] for arrow in points.values())

    def on(self, process: str, thread: str = "") -> list[Shown]:
        """The slices of a process, or of one of its tracks, in the order of time."""
        found = [s for s in self.slices if s.process == process and (not thread or s.thread == thread)]
        return sorted(found, key=lambda s: s.start)

    def _track(self, event: dict[str, Any]) -> tuple[str, str]:
        return self._processes[event["pid"]], self._threads[event["pid"], event["tid"]]

    def _slice_at(self, event: dict[str, Any]) -> Shown:
        """The slice that an end of an arrow is drawn at: the one on its track that has begun and not ended."""
        process, thread = self._track(event)
        there = [s for s in self.on(process, thread) if s.start <= event["ts"] < s.end]
        assert len(there) == 1, (event, there)
        return there[0]


def traces_of(compute: Sequence[range | None], prompts: int, *, memory_nodes: int = 2) -> dict[str, Trace]:
    """What is recorded while so many requests are answered."""
    pipeline = PipelineConfig(batches=2, max_batch=2, prefill_tokens=24)
    config = make_config(compute=compute, memory_nodes=memory_nodes, pipeline=pipeline)

    async def main(world: World) -> dict[str, Trace]:
        async with new_cluster(world, config, layers=LAYERS, seconds=seconds) as cluster:
            await cluster.ready()
            recording = asyncio.create_task(record(config, RECORD_S, network=world.network, clock=world.loop.time))
            await asyncio.sleep(0.1)
            async with cluster.client() as client:
                prompt = [1] * PROMPT
                await asyncio.gather(*(client.generate(prompt, max_tokens=TOKENS) for _ in range(prompts)))
            found = await recording
            await cluster.stop_all()
            return found

    with World(1, model=LINK, tracing=False) as world:
        return world.run(main(world))


def seconds(node: NodeConfig) -> Callable[[str, Place | None], float]:
    """No operation takes no time, so that every slice can be seen."""
    return lambda name, at: SECONDS.get(name.lstrip("_"), 1e-6)


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    """Three requests in two batches, on one compute and two memory nodes."""
    return traces_of([None], 3)


def test_every_node_has_one_track_for_its_device(traces: dict[str, Trace]) -> None:
    """Operations of all batches follow each other on it, with batch, layer and step, and none overlaps the next."""
    viewer = Viewer(chrome(traces))

    for node, names in (("c0", {"begin", "head", "tail", "sample"}), ("m0", {"plan", "past", "finish"})):
        device = viewer.on(node, "device")
        assert {s.name for s in device} >= names
        assert {s.args["batch"] for s in device if s.name in names} == {0, 1}
        assert all(a.end <= b.start + 1e-3 for a, b in pairwise(device))
        layers = Counter(s.args["layer"] for s in device if s.name in ("head", "past"))
        assert layers.keys() == set(range(LAYERS))
        assert len(set(layers.values())) == 1
        assert all(s.args["step"] >= 0 for s in device if s.name in names)
    assert {s.args["peer"] for s in viewer.on("m0", "device") if s.name == "past"} == {"c0"}


def test_steps_name_the_requests_in_them(traces: dict[str, Trace]) -> None:
    """Each step of a batch says which requests it prefilled and which it decoded."""
    viewer = Viewer(chrome(traces))
    steps = [s for thread in ("batch 0", "batch 1") for s in viewer.on("c0", thread) if s.name.startswith("step ")]

    decoded = Counter(request for s in steps for request in s.args.get("decode", []))
    assert len(decoded) == 3
    assert set(decoded.values()) == {TOKENS - 1}  # the prompt's last chunk gives the first token
    assert {request for s in steps for request in s.args.get("prefill", [])} == decoded.keys()


def test_every_request_has_a_track(traces: dict[str, Trace]) -> None:
    """It shows when the request was prefilled and when decoded, each as one slice."""
    viewer = Viewer(chrome(traces))

    requests = {s.args["request"] for s in viewer.on("requests")}
    assert len(requests) == 3
    for request in requests:
        prefill, decode = viewer.on("requests", f"request {request}")
        assert (prefill.name, decode.name) == ("prefill", "decode")
        assert prefill.end <= decode.start + 1e-3
        assert decode.args["steps"] == TOKENS - 1
        assert prefill.args["request"] == request


@pytest.mark.parametrize("compute", [[None], [range(2), range(2, LAYERS)]], ids=["one", "by layers"])
def test_arrows_lead_to_attention_and_back(compute: Sequence[range | None]) -> None:
    """Every query that a decode step sends has an arrow to the attention of its layer, and its answer one to the
    operation that needs it, on whichever compute node that is; both go over the wire."""
    viewer = Viewer(chrome(traces_of(compute, 2)))
    memory = ("m0", "m1")

    decoded = {(s.args["batch"], s.args["step"]) for node in memory for s in viewer.on(node) if s.name == "finish"}
    queries = [arrow for arrow in viewer.arrows if arrow[0].name == "head"]
    answers = [arrow for arrow in viewer.arrows if arrow[0].name == "finish"]
    assert len(queries) == len(answers) == len(decoded) * len(memory) * LAYERS > 0
    assert len(queries) + len(answers) == len(viewer.arrows)
    for head, wire, past in queries:
        assert (wire.process, wire.name, past.name, past.process in memory) == ("wire", "query", "past", True)
        assert head.args | {"peer": past.args["peer"]} == past.args
        assert past.args["peer"] == head.process
        assert head.end <= wire.end <= past.start
    for finish, wire, needs in answers:
        layer = finish.args["layer"]
        assert (wire.process, wire.name) == ("wire", "answer")
        assert finish.end <= wire.end <= needs.start
        assert needs.args["step"] == finish.args["step"]
        assert (needs.name, needs.args.get("layer")) == (
            ("sample", None) if layer == LAYERS - 1 else ("head", layer + 1)
        )


def test_waits_and_the_wire_take_the_time_of_the_links_and_of_attention() -> None:
    """With one request, a step waits from the end of its tail until the answer has come over the wire."""
    viewer = Viewer(chrome(traces_of([None], 1, memory_nodes=1)))

    waits = [s for s in viewer.on("c0") if s.name == "wait for m0"]
    wires = viewer.on("wire", "c0 – m0, batch 0")
    assert waits
    assert len([s for s in wires if s.name == "answer"]) == len(waits)
    for s in wires:
        assert s.end - s.start == pytest.approx(LINK.latency_s * US, rel=0.2)
    attention = (SECONDS["past"] + SECONDS["finish"] - SECONDS["tail"] + 2 * LINK.latency_s) * US
    for s in waits:
        assert s.end - s.start == pytest.approx(attention, rel=0.2)
        assert s.args["for"] == "answer"


def test_a_trace_of_an_idle_cluster_says_so(tmp_path: Path) -> None:
    """There is no file then, and the sentence says what to do."""
    out = tmp_path / "trace.json"
    with pytest.raises(LaminaError, match=r"no node computed anything in the 1 s; have requests answered meanwhile"):
        write(traces_of([None], 0), RECORD_S, out)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_is_written_as_a_whole_or_not_at_all(
    traces: dict[str, Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk is full, one sentence says so, and an older file stays as it was."""
    with pytest.raises(LaminaError, match=r"^--out: /dev/full cannot be written: No space left on device; name"):
        write(traces, RECORD_S, Path("/dev/full"))

    out = tmp_path / "trace.json"
    out.write_text("older")

    def fail(path: Path, contents: bytes) -> int:
        with path.open("wb") as file:
            file.write(contents[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail)
        with pytest.raises(LaminaError, match="No space left on device"):
            write(traces, RECORD_S, out)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("trace.json", "older")]

    link = tmp_path / "link.json"
    link.symlink_to(out)
    write(traces, RECORD_S, link)
    assert link.is_symlink()
    assert out.read_bytes().startswith(b'{"displayTimeUnit"')
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    """Before anything is recorded: a folder that does not exist, and a folder in place of a file."""
    with pytest.raises(ConfigError, match=r"^--out: .*the folder .*none does not exist; make it first"):
        check_target(tmp_path / "none" / "trace.json", "--out")
    with pytest.raises(ConfigError, match=r"is a folder; name a file in it"):
        check_target(tmp_path, "--out")
    check_target(tmp_path / "trace.json", "--out")
    check_target(Path("/dev/null"), "--out")
