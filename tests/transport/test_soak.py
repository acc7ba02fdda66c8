"""Links under full load, again and again: nothing is damaged, and nothing stays behind."""

import json
import subprocess
import sys

import pytest

from lamina.bench.soak import Footprint, SoakError, check

SECONDS = 20


@pytest.mark.slow
def test_a_short_soak() -> None:
    """Every transport of one machine, links that end in every way: all bytes arrive, nothing grows."""
    options = ["--minutes", str(SECONDS / 60), "--link-seconds", "0.3"]
    for transport in ("tcp", "tcp+tls", "shm"):
        options += ["--transport", transport]
    done = subprocess.run([sys.executable, "-m", "lamina.bench.soak", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["transports"] == ["tcp", "tcp+tls", "shm"]
    assert found["links"] >= 12
    assert found["writes"] > 1000


STEADY = Footprint(resident=30 << 20, descriptors=20, writes=10, nbytes=1000)


def test_growth_is_found() -> None:
    """A process that keeps a descriptor of each link, or some memory, fails; one that settles at the start does not."""
    settled = [STEADY] * 3 + [Footprint(resident=40 << 20, descriptors=25, writes=10, nbytes=1000)] * 21
    assert check([(STEADY, each) for each in settled])["writes"] == 480
    descriptors = [Footprint(resident=30 << 20, descriptors=20 + i, writes=10, nbytes=1000) for i in range(24)]
    with pytest.raises(SoakError, match="the far end had 26 file descriptors, and then 38"):
        check([(STEADY, each) for each in descriptors])
    memory = [Footprint(resident=(30 + i) << 20, descriptors=20, writes=10, nbytes=1000) for i in range(24)]
    with pytest.raises(SoakError, match="the memory of the near end grew"):
        check([(each, STEADY) for each in memory])
