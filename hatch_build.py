"""The package's build: compile the native attention kernel with the machine's C++ compiler.

Without a compiler the package is built all the same; the attention backend ``native`` then says what is missing.
"""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernel(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        native = runpy.run_path(str(Path(self.root, "lamina", "attention", "native", "build.py")))
        try:
            library: Path = native["build"]()
        except native["BuildError"] as error:
            self.app.display_warning(
                f"lamina: built without the native attention kernel, so memory nodes are much slower: {error}; "
                "then run: python -m lamina.attention.native.build"
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"].append(f"lamina/attention/native/{library.name}")
