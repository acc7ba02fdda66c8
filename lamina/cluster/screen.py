"""How ``lamina up`` shows its nodes: as a list that is kept up to date on a terminal, as lines elsewhere."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping

from rich.cells import cell_len

from lamina.config import ClusterConfig
from lamina.table import discard_output


class Screen:
    """Writes to standard output as long as that has a reader; the nodes do not depend on it."""

    def __init__(self, config: ClusterConfig, others: Mapping[str, tuple[str, str]] | None = None) -> None:
        """``others`` are processes beside the nodes: the role and the address of each, by name."""
        self._nodes = {n.name: (n.role, str(n.address)) for n in config.node} | dict(others or {})
        self._terminal = sys.stdout.isatty()
        self._drawn = 0
        """How many lines of the terminal hold the list of nodes, which is the last thing above the cursor."""

    def show(self, name: str, states: dict[str, str]) -> None:
        """Show that the state of the node called ``name`` has changed; ``states`` has all of them."""
        if not self._terminal:
            self._write(f"{name} ({self._nodes[name][0]}) {states[name]}\n")
            return
        rows = [(node, role, states[node], address) for node, (role, address) in self._nodes.items()]
        widths = [max(cell_len(row[i]) for row in rows) for i in range(3)]
        lines = []
        for node, role, state, address in rows:
            cells = [node.ljust(widths[0]), role.ljust(widths[1]), state.ljust(widths[2]), address]
            lines.append("  ".join(cells) if len("  ".join(cells)) < self._columns else f"{node}  {state}")
        up = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
        self._write(up + "".join(f"{line}\n" for line in lines))
        self._drawn = sum(-(-max(1, cell_len(line)) // self._columns) for line in lines)

    def say(self, *sentences: str) -> None:
        """Write sentences, each on a line of its own, below everything else."""
        self._drawn = 0
        self._write("".join(f"{sentence}\n" for sentence in sentences))

    @property
    def _columns(self) -> int:
        return max(1, shutil.get_terminal_size().columns)

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError:  # the reader is gone, or the disk is full
            discard_output()
