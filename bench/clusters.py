"""Local clusters whose compute node is one of the benchmarks' own."""

from __future__ import annotations

from lamina.cluster.local import Cluster
from lamina.config import NodeConfig


class FilledCluster(Cluster):
    """A cluster whose compute node fills prompts in at random (`lamina.bench.filled`), so that they cost nothing."""

    module = "filled"

    def command(self, node: NodeConfig) -> list[str]:
        """Run the compute node by the module of this class, and memory nodes as always."""
        if node.role == "memory":
            return super().command(node)
        return ["-m", f"lamina.bench.{self.module}", str(self._config.file), node.name]


class QueryLastCluster(FilledCluster):
    """A filled cluster whose compute node sends q together with k and v instead of before them."""

    module = "query_last"
