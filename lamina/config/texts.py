"""Values that stand as text in the cluster file: sizes, processors, layers, addresses and devices.

Each is parsed once, when the file is loaded. The structs hold the values, and ``write_cluster`` writes them as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from msgspec import Struct

from lamina.errors import ConfigError
from lamina.limits import MAX_BYTES
from lamina.transport import Address

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE, _LAYERS, _CPUS = 'a size like "16GiB"', 'layers like "0-15"', 'processor numbers like "0-3,8"'
_DEVICE = '"cpu" or "cuda:N"'
_FOLDER = 'a folder like "/var/lib/lamina"'
_NAME = 'a name like "m0", of at most 64 letters, digits, dots, dashes and underscores'

_MAX_DIGITS = 20
"""Digits of a size that are read before and after the point; no size within MAX_BYTES has more."""


class Text(NamedTuple):
    """The mark of a field that stands as text in the file: what is expected there, how it is read and written."""

    expected: str
    parse: Callable[[str], Any]
    format: Callable[[Any], str]


def text_fields(kind: type[Struct]) -> dict[str, Text]:
    """The fields of ``kind`` that stand as text in the file."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: mark for name in kind.__struct_fields__ for mark in _marks(hints[name])}


def _marks(hint: Any) -> list[Text]:
    """The marks of a type; an optional type has those of its parts."""
    kinds = (hint, *get_args(hint))
    return [mark for kind in kinds for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, Text)]


def parse_size(text: str) -> int:
    """Bytes of a size such as "512MiB" or "1.5GiB", at most MAX_BYTES."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?\s*(KiB|MiB|GiB|TiB)", text.strip())
    nbytes = 0
    if match:
        whole, fraction = match[1].lstrip("0")[:_MAX_DIGITS], (match[2] or "")[:_MAX_DIGITS]
        nbytes = int(f"0{whole}{fraction}") * _UNITS[match[3]] // 10 ** len(fraction)
    if nbytes < 1:
        raise ConfigError(f"expected {_SIZE}, got {text!r:.200}")
    if nbytes > MAX_BYTES:
        raise ConfigError(f"expected a size of at most {MAX_BYTES // 2**40}TiB, got {text!r:.200}")
    return nbytes


def format_size(nbytes: int) -> str:
    """The exact text of a size: in the largest unit that needs no more than three decimals, else in KiB."""
    exact = ((unit, size) for unit, size in reversed(_UNITS.items()) if nbytes >= size and nbytes * 1000 % size == 0)
    unit, size = next(exact, ("KiB", 2**10))
    whole, rest = divmod(nbytes, size)
    return f"{whole}.{rest * 10**10 // size:010}".rstrip("0").rstrip(".") + unit


def parse_range(text: str) -> range:
    """Numbers such as "0-15" or "3", both ends included; none is above 99999."""
    numbers = _span(text)
    if numbers is None:
        raise ConfigError(f"expected {_LAYERS}, got {text!r:.200}")
    return numbers


def format_range(numbers: range) -> str:
    """The text of a range that has at least one number and leaves none out."""
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def parse_cpus(text: str) -> frozenset[int]:
    """Processor numbers of a list such as "0-3,8"; none is above 99999."""
    cpus: set[int] = set()
    for part in text.split(","):
        numbers = _span(part)
        if numbers is None:
            raise ConfigError(f"expected {_CPUS}, got {text!r:.200}")
        cpus.update(numbers)
    return frozenset(cpus)


def format_cpus(cpus: Iterable[int]) -> str:
    """The text of a set of processor numbers, with runs such as "0-3"."""
    runs: list[range] = []
    for cpu in sorted(cpus):
        if runs and runs[-1].stop == cpu:
            runs[-1] = range(runs[-1].start, cpu + 1)
        else:
            runs.append(range(cpu, cpu + 1))
    return ",".join(map(format_range, runs))


def _span(text: str) -> range | None:
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text.strip())
    if match is None or int(match[2] or match[1]) < int(match[1]):
        return None
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def parse_device(text: str) -> str:
    """The name of a device."""
    if not re.fullmatch(r"cpu|cuda:\d{1,3}", text):
        raise ConfigError(f"expected {_DEVICE}, got {text!r:.200}")
    return text


def parse_name(text: str) -> str:
    """The name of a node."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text):
        raise ConfigError(f"expected {_NAME}, got {text!r:.200}")
    return text


def _parse_folder(text: str) -> str:
    if not text or "\0" in text:
        raise ConfigError(f"expected {_FOLDER}, got {text!r:.200}")
    return text


Size = Annotated[int, Text(_SIZE, parse_size, format_size)]
"""Bytes."""
Cpus = Annotated[frozenset[int], Text(_CPUS, parse_cpus, format_cpus)]
Layers = Annotated[range, Text(_LAYERS, parse_range, format_range)]
ListenAddress = Annotated[Address, Text('an address like "tcp://10.0.0.1:7070"', Address.parse, str)]
DeviceName = Annotated[str, Text(_DEVICE, parse_device, str)]
NodeName = Annotated[str, Text(_NAME, parse_name, str)]
Folder = Annotated[str, Text(_FOLDER, _parse_folder, str)]
