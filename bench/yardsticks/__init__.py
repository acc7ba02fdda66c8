"""What transports are compared with: minimal programs over the same medium, and the usual tools.

All of them speak the protocol that ``pingpong.c`` describes, and so do the ends of Lamina's own links.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

from lamina.attention.native.build import BuildError, compiler
from lamina.bench.ends import Task
from lamina.errors import LaminaError, TransportError

SOURCE = Path(__file__).with_name("pingpong.c")
FLAGS = ["-x", "c", "-std=gnu11", "-O2", "-Wall", "-Wextra"]
ANSWER_S = 120.0
"""How long an answer may take."""

PORT = 18515
"""The port over which the two ends of perftest and ibv_rc_pingpong exchange their addresses."""
TRIPS, FLOOD_BYTES = 500, 64 << 20
"""The round trips and the bytes of one run of these tools, which count instead of watching the clock."""
ATTEMPTS, PAUSE_S = 100, 0.05
"""How often a client tries to reach the server of these tools, and the pause in between."""
RUNS = 5
"""How often a tool runs if its clock fails: perftest counts the processor's cycles, and reports a bandwidth or a time
of zero where it cannot determine their frequency, as happens on a busy virtual machine."""

Result = dict[str, float]
"""``p50_us``, ``p99_us`` and ``gbps``, as far as they are known; for Lamina's ends also the processor time."""


class Mover(Protocol):
    """Something that moves bytes between two processes and can be measured."""

    def measure(self, task: Task) -> Result:
        """Measure one task. TransportError says why that failed."""

    def close(self) -> None:
        """End the processes."""


class Program:
    """Two processes that wait for tasks until they are closed."""

    def __init__(self, command: list[str]) -> None:
        self._name = " ".join(command[:3])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # so that both end together, and not by Ctrl-C
        )

    @classmethod
    def module(cls, name: str, *arguments: str) -> Program:
        """Run a module of ``lamina.bench``."""
        return cls([sys.executable, "-P", "-m", f"lamina.bench.{name}", *arguments])

    def measure(self, task: Task) -> Result:
        asked, answered = self._process.stdin, self._process.stdout
        assert asked is not None
        assert answered is not None
        try:
            asked.write(f"{task.line}\n")
            asked.flush()
        except BrokenPipeError:
            raise self._ended() from None
        if not select.select([answered], [], [], ANSWER_S)[0]:
            raise TransportError(f"{self._name} gave no answer within {ANSWER_S:g} s")
        line = answered.readline()
        if not line:
            raise self._ended()
        result = json.loads(line)
        if "error" in result:
            raise TransportError(result["error"])
        return dict(result)

    def _ended(self) -> TransportError:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return TransportError(f"{self._name} ended: {lines[-1] if lines else 'it printed no reason'}")

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._errors.close()


def build(folder: Path) -> Path:
    """Compile ``pingpong.c`` into ``folder`` and return the program. LaminaError if that fails."""
    output = folder / "pingpong"
    try:
        command = [compiler(), *FLAGS, str(SOURCE), "-o", str(output)]
    except BuildError as error:
        cc = shutil.which("cc")
        if cc is None:
            raise LaminaError(str(error)) from error
        command = [cc, *FLAGS, str(SOURCE), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaminaError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return output


class Tool:
    """A server and a client of perftest or rdma-core, started again for each measurement."""

    def __init__(self, name: str, places: tuple[tuple[str, int], tuple[str, int]], cpus: tuple[int, int]) -> None:
        """``places`` holds the device and the GID index of the near and the far end."""
        self._name = name
        self._places = places
        self._cpus = cpus

    def measure(self, task: Task) -> Result:
        for _ in range(RUNS):
            result = self._run(task)
            if all(result.values()):
                return result
        raise TransportError(f"{self._name} reported a result of zero {RUNS} times: its clock fails on this machine")

    def _run(self, task: Task) -> Result:
        count = max(8, min(TRIPS, FLOOD_BYTES // task.size)) + 2 * task.depth
        server = self._start(1, task, count)
        try:
            for _ in range(ATTEMPTS):
                client = self._start(0, task, count)
                output = client.communicate(timeout=ANSWER_S)[0]
                if client.returncode == 0:
                    return self._read(output, task)
                if server.poll() is not None:
                    break
                time.sleep(PAUSE_S)
            raise TransportError(f"{self._name} failed: {output.strip()[-300:]}")
        except subprocess.TimeoutExpired as error:
            client.kill()
            client.communicate()
            raise TransportError(f"{self._name} took longer than {ANSWER_S:g} s") from error
        finally:
            server.kill()
            server.communicate()

    def close(self) -> None:
        """Do nothing: no process outlives its measurement."""

    def _start(self, end: int, task: Task, count: int) -> subprocess.Popen[str]:
        device, gid = self._places[end]
        command = [self._name, f"--ib-dev={device}", f"--port={PORT}", f"--size={task.size}", f"--iters={count}"]
        if self._name == "ibv_rc_pingpong":
            command += ["--events", f"--gid-idx={gid}"]
        elif self._name == "ib_write_lat":
            command += ["-F", f"--gid-index={gid}"]
        else:
            command += ["-F", f"--gid-index={gid}", "--report_gbits", f"--tx-depth={task.depth}"]
        if end == 0:
            command.append("127.0.0.1")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if self._cpus[end] >= 0:
            os.sched_setaffinity(process.pid, {self._cpus[end]})
        return process

    def _read(self, output: str, task: Task) -> Result:
        if self._name == "ibv_rc_pingpong":
            found = re.search(r"= ([\d.]+) usec/iter", output)
            if found:
                return {"p50_us": float(found[1])}
        else:
            row = next((line.split() for line in output.splitlines() if re.match(rf" *{task.size} +\d", line)), None)
            if row and self._name == "ib_write_lat":
                # bytes, iterations, then microseconds one way: least, most, typical, mean, deviation, 99 %
                return {"p50_us": 2 * float(row[4]), "p99_us": 2 * float(row[7])}
            if row:
                # bytes, iterations, then gigabits per second: peak, mean
                return {"gbps": float(row[3]) / 8}
        raise TransportError(f"{self._name} reported no result: {output.strip()[-300:]}")
