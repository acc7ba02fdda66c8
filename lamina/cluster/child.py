"""One node of a cluster as a process of this machine: how it is started, what it reports, how it is ended."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from typing import IO

import msgspec

from lamina.log import REPORT_VARIABLE, NodeReport

log = logging.getLogger("lamina.cluster")


class Child:
    """The process of a node. ``on_report`` gets what the node reports: how far its start is, and why it ends."""

    def __init__(self, process: Process, reports: int, on_report: Callable[[NodeReport], None]) -> None:
        """``reports`` is the end of a pipe that this object closes."""
        self.process = process
        self._reports = reports
        self._on_report = on_report
        self._unfinished = b""
        asyncio.get_running_loop().add_reader(reports, self._read)

    @classmethod
    async def start(
        cls,
        arguments: Sequence[str],
        *,
        threads: int,
        log_file: IO[bytes] | None,
        on_report: Callable[[NodeReport], None],
    ) -> Child:
        """Run this Python with ``arguments``; ``threads`` is how many threads compute unless the environment says."""
        near, far = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            starting = asyncio.ensure_future(
                asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # else files of the current folder, such as a token.py, would be imported as modules
                    *arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log_file or sys.stderr,
                    stderr=log_file,
                    pass_fds=(far,),
                    env={"OMP_NUM_THREADS": str(threads), **os.environ, REPORT_VARIABLE: str(far)},
                    # In a session of its own the node does not get Ctrl-C of the terminal, so that nodes stop in order.
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )
            try:
                process = await asyncio.shield(starting)
            except asyncio.CancelledError:  # uvloop would leave the process behind
                await asyncio.wait([starting])
                if starting.exception() is None:
                    starting.result().kill()
                    await starting.result().wait()
                raise
        except BaseException:
            os.close(near)
            raise
        finally:
            os.close(far)
        return cls(process, near, on_report)

    async def wait(self) -> int:
        """Wait for the end of the process, and return its exit status, or minus the signal that killed it."""
        status = await self.process.wait()
        if self._reports >= 0:
            self._read()  # what it reported last
            self.close()
        return status

    async def end(self, patience_s: float) -> None:
        """Ask the process to stop, and kill it if it has not stopped within ``patience_s``."""
        for number in (signal.SIGTERM, signal.SIGCONT):  # a suspended process gets the first signal after the second
            if self.process.returncode is None:
                self.process.send_signal(number)
        try:
            await asyncio.wait_for(self.process.wait(), patience_s)
        except TimeoutError:
            log.warning("event=killed pid=%d", self.process.pid)
            if self.process.returncode is None:
                self.process.kill()
            await self.process.wait()

    def close(self) -> None:
        """Hear no more reports."""
        if self._reports >= 0:
            asyncio.get_running_loop().remove_reader(self._reports)
            os.close(self._reports)
            self._reports = -1

    def _read(self) -> None:
        try:
            while piece := os.read(self._reports, 1 << 16):
                self._unfinished += piece
        except BlockingIOError:
            pass
        else:
            self.close()
        *lines, self._unfinished = self._unfinished.split(b"\n")
        for line in lines:
            self._on_report(msgspec.json.decode(line, type=NodeReport))


def _die_with_parent() -> None:
    """Make the kernel stop this child process when its parent dies (Linux)."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
