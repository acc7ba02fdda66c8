"""The files of a checkpoint directory, found in the order of the ``transformers`` library and checked without torch."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lamina.errors import CheckpointError, UnsupportedModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = ("float32", "bfloat16", "float16")
"""The data types that a model can run in."""

_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_POINTER = b"version https://git-lfs"
_SOME = 3
"""How many names a message or a log line gives."""


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a checkpoint, in the order in which they are read.

    Where a tensor is in several, the last one counts. ``index`` names them, and ``listed`` are the tensors that it
    promises; both are empty for a single file.
    """

    files: tuple[Path, ...]
    index: Path | None = None
    listed: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Path]:
        """Return the file of each tensor. A CheckpointError names a file that cannot be read, or a tensor that is in
        the index and in no file."""
        found = {}
        for path in self.files:
            with opened(path) as file:
                found.update(dict.fromkeys(file.keys(), path))
        for name in self.listed:
            if name not in found:
                raise CheckpointError(f"{self.index}: tensor {name!r} is in the index but in none of its files")
        return found

    def __str__(self) -> str:
        names = [path.name for path in self.files]
        return ", ".join(names) if len(names) <= _SOME else f"{names[0]} to {names[-1]} ({len(names)} files)"


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json of the directory ``path``. A CheckpointError says why it cannot be, or is not supported."""
    if (mode := _mode(path)) is None:
        raise CheckpointError(f"{path}: no such checkpoint directory{_dangling(path)}")
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: not a directory; expected the checkpoint directory that holds config.json")
    raw = read_json(path / "config.json")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedModelError(
            f"{path / 'config.json'}: quantization_config (method {method!r}) is not supported; use a checkpoint with "
            f"weights in one of {', '.join(DTYPES)}"
        )
    return raw


def find_weights(path: Path, config: dict[str, Any]) -> WeightFiles:
    """Return the files that hold the weights of the directory ``path``, of which ``config`` is config.json.

    As in the library, a file that config.json names as ``transformers_weights`` comes first, then model.safetensors,
    then the index of shards.
    """
    chosen = config.get("transformers_weights")
    if chosen is not None:
        if not isinstance(chosen, str) or not chosen.endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(
                f"{path / 'config.json'}: transformers_weights: expected a safetensors file or an index of such, got "
                f"{chosen!r}"
            )
        file = _inside(path, chosen, "config.json")
        if not is_file(file):
            raise CheckpointError(f"{file}: named in config.json but missing{_dangling(file)}")
        return _shards(path, file) if chosen.endswith(".json") else WeightFiles((file,))
    single, index = path / SINGLE, path / INDEX
    if is_file(single):
        return WeightFiles((single,))
    if is_file(index):
        return _shards(path, index)
    for file in (single, index):
        if file.is_symlink():
            raise CheckpointError(f"{file}: missing{_dangling(file)}")
    with _accessible(path):
        other = min((p.name for p in path.glob("*.bin")), default=None)
    hint = f"; {other} is a pickle, which Lamina never reads; convert it to safetensors" if other else ""
    raise CheckpointError(f"{path}: neither {SINGLE} nor {INDEX} found{hint}")


def stored_dtype(path: Path, config: dict[str, Any]) -> str:
    """Return the data type in which the weights are stored: as in the library, that of the first tensor of
    floating-point numbers with 16 bits or more.

    It is float32 for a directory without weights, of which only the configuration is of interest.
    """
    if "transformers_weights" not in config and not any(is_file(path / name) for name in (SINGLE, INDEX)):
        return "float32"
    first = find_weights(path, config).files[0]
    with opened(first) as file:
        stored = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118 - this is no mapping
    return next((_STORED[name] for name in stored if name in _STORED), ", ".join(sorted(set(stored))))


def _shards(path: Path, index: Path) -> WeightFiles:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names")
    files = [_inside(path, name, index.name) for name in sorted(set(weight_map.values()))]
    for file in files:
        if not is_file(file):
            raise CheckpointError(f"{file}: listed in {index.name} but missing{_dangling(file)}")
    return WeightFiles(tuple(files), index, tuple(weight_map))


def _inside(path: Path, name: str, source: str) -> Path:
    """Return the file ``name`` of the directory ``path``; a CheckpointError if it would lie elsewhere."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        raise CheckpointError(f"{path / source}: names the file {name!r}, which is not in this directory")
    return path / name


@contextmanager
def opened(path: Path, framework: str = "np") -> Iterator[Any]:
    """Open a safetensors file and check its header; ``framework`` "pt" gives tensors of torch."""
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework=framework)
    except (SafetensorError, OSError) as e:
        with _accessible(path), path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise CheckpointError(
                    f"{path}: not a readable safetensors file but a pointer of Git LFS; run: git lfs pull"
                ) from e
        raise CheckpointError(f"{path}: not a readable safetensors file ({_first_line(e)}); it may be truncated") from e
    with handle as file:
        yield file


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``; a CheckpointError says why there is none."""
    with _accessible(path):
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError as e:
            raise CheckpointError(f"{path}: missing{_dangling(path)}") from e
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{path}: not readable as JSON ({_first_line(e)})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def is_file(path: Path) -> bool:
    """Return whether ``path`` is a file. A CheckpointError says that this user may not know."""
    return stat.S_ISREG(_mode(path) or 0)


def _mode(path: Path) -> int | None:
    with _accessible(path):
        try:
            return path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None


@contextmanager
def _accessible(path: Path) -> Iterator[None]:
    """Turn an error of the system into a CheckpointError that names the file."""
    try:
        yield
    except OSError as e:
        where = e.filename or path
        advice = "; give the user that runs Lamina the right to read it" if isinstance(e, PermissionError) else ""
        raise CheckpointError(f"{where}: cannot be read: {e.strerror or _first_line(e)}{advice}") from e


def check_tokenizer(path: Path) -> None:
    """Check that tokenizer.json of the directory ``path``, if it is there, can be read. CheckpointError if not."""
    file = path / "tokenizer.json"
    if not is_file(file):
        if file.is_symlink():
            raise CheckpointError(f"{file}: missing{_dangling(file)}")
        return
    from tokenizers import Tokenizer

    with _accessible(file):
        file.open("rb").close()
    try:
        Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises nothing more specific
        raise CheckpointError(f"{file}: the tokenizer cannot be read: {_first_line(e)}") from e


def _dangling(path: Path) -> str:
    """Say where ``path`` leads if it is a symbolic link whose target is missing."""
    return f": it is a symbolic link to {path.readlink()}, which does not exist" if path.is_symlink() else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
