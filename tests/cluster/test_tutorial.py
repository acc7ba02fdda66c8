"""The tutorial, followed to the letter, and the programs of other pages."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lamina.demo.run import CHECKPOINT
from tests import harness

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
PORTS = ("7070", "7071", "7072")


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_tutorial_works(tmp_path: Path) -> None:
    """Each command and each program does what the page says, with other ports and a checkpoint beside the file, which
    has a chat template."""
    page, ports = PAGE, harness.free_ports(len(PORTS))
    for port, free in zip(PORTS, ports, strict=True):
        page = page.replace(port, str(free))
    shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    (file,) = blocks("toml", page)
    (tmp_path / "cluster.toml").write_text(file)
    log = tmp_path / "up.log"
    log.touch()
    up = harness.start(log, "up", str(tmp_path / "cluster.toml"))
    with harness.running(up):
        deadline_s = time.monotonic() + 100
        while "ready; next: lamina generate" not in (shown := log.read_text()):
            assert time.monotonic() < deadline_s, shown
            time.sleep(0.2)
        story = ""
        for line in "".join(blocks("console", page)).splitlines():
            prompt, *arguments = shlex.split(line)
            assert prompt == "$"
            assert arguments[0] == "lamina"
            command = [sys.executable, "-P", "-m", *arguments]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            if arguments[1] == "generate":
                story = done.stdout
            if arguments[1] == "status":
                assert len(re.findall(r"(compute|memory) +ready ", done.stdout)) == 3
        assert len(story.split()) > 10
        (program,) = blocks("python", page)
        assert run(program, tmp_path).strip() == story.strip()
        for other in (ROOT / "README.md", ROOT / "docs" / "client.md"):
            programs = [text for text in blocks("python", other.read_text()) if "import lamina" in text]
            assert len(programs) == (4 if other.name == "client.md" else 2)
            for program in programs:
                assert run(program.replace(PORTS[0], str(ports[0])), tmp_path).strip()


def run(program: str, folder: Path) -> str:
    """What a program writes; it must end well."""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
