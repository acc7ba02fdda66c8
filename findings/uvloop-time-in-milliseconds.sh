#!/usr/bin/env bash
# uvloop 0.23.0: loop.time() counts whole milliseconds, where asyncio's own loops count nanoseconds.
#
# A program that measures durations with loop.time() finds most of those below a millisecond to be exactly 0 when it is
# run with uvloop.run, and the others to be 1 ms.
#
# Output seen:
#   asyncio: 0.3 ms of work took 0 s in 0 of 100 measurements
#   uvloop: 0.3 ms of work took exactly 0 or 1 ms in 100 of 100 measurements, 0 in more than half
#
# Exits with a status other than 0 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check uvloop==0.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import time

import uvloop


async def measure() -> list[float]:
    loop = asyncio.get_running_loop()
    durations = []
    for _ in range(100):
        start, until = loop.time(), time.perf_counter() + 0.0003
        while time.perf_counter() < until:
            pass
        durations.append(loop.time() - start)
        await asyncio.sleep(0)
    return durations


zero = sum(duration == 0 for duration in asyncio.run(measure()))
assert zero == 0, zero
print(f"asyncio: 0.3 ms of work took 0 s in {zero} of 100 measurements")
found = uvloop.run(measure())
whole = sum(abs(duration * 1000 - round(duration * 1000)) < 1e-6 and duration < 0.0015 for duration in found)
assert whole >= 95, found  # a busy machine may take longer now and then
assert sum(duration < 1e-9 for duration in found) > 50, found
print(f"uvloop: 0.3 ms of work took exactly 0 or 1 ms in {whole} of 100 measurements, 0 in more than half")
PYTHON
