"""The options of ``lamina serve`` that are about HTTP, and the file of its keys."""

from __future__ import annotations

import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamina.chat.formats import require_reasoning_format, require_tool_format
from lamina.config import read_private
from lamina.errors import ConfigError
from lamina.transport import Address

DEFAULT_BODY = 16 << 20
"""The most bytes of a request's body."""
MAX_KEY_FILE = 1 << 16
MIN_KEY = 8
"""The least characters of an API key."""
MAX_TEMPLATE = 1 << 20
"""The most bytes of a chat template."""
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")
"""What browsers send as the origin of a page, which has no path: another text would match none."""


@dataclass(frozen=True)
class ChatOptions:
    """Says how the model chats, where that is not as its checkpoint shows."""

    template: Path | None = None
    """The file of a template in the place of the checkpoint's."""
    tools: str | None = None
    """The name of the format in which the model writes calls of tools."""
    reasoning: str | None = None
    """The name of the format in which it writes its reasoning."""

    def check(self) -> None:
        """Raise ConfigError for a name that is unknown, or a file that cannot be read."""
        require_tool_format(self.tools)
        require_reasoning_format(self.reasoning)
        self.read_template()

    def read_template(self) -> str | None:
        """Return the template. ConfigError if it cannot be read."""
        if self.template is None:
            return None
        try:
            with self.template.open("rb") as file:
                text = file.read(MAX_TEMPLATE + 1)
            if len(text) > MAX_TEMPLATE:
                raise ConfigError(f"--chat-template: {self.template} has more than {MAX_TEMPLATE} bytes")
            return text.decode()
        except OSError as e:
            raise ConfigError(f"--chat-template: {self.template} cannot be read: {e.strerror}") from e
        except UnicodeDecodeError as e:
            raise ConfigError(f"--chat-template: {self.template}: expected text in UTF-8") from e


@dataclass(frozen=True)
class ServeOptions:
    """The options of ``lamina serve`` that are about HTTP."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    """Has one key on each line."""
    names: Sequence[str] = ()
    """The names of the model. None: the name of its folder."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    origins: Sequence[str] = ()
    """Whose pages browsers let use the server."""
    max_body: int = DEFAULT_BODY
    chat: ChatOptions = ChatOptions()
    files: Path | None = None
    """The folder of uploaded files and of batches. None: one of this user, if no other server has it."""

    def keys(self) -> list[bytes]:
        """Return the API keys. ConfigError if the file has none, if others can read it, or if a key is too short."""
        if self.api_key_file is None:
            return []
        return read_keys(self.api_key_file)

    def check(self) -> None:
        """Raise ConfigError for options that do not fit together."""
        if not Address("tcp", self.host, self.port).is_loopback and self.api_key_file is None:
            raise ConfigError(
                f"--host: {self.host} can be reached from other machines, so it needs --api-key-file with the keys "
                "of those who may use it, one a line; without keys, serve 127.0.0.1"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "--tls-key" if self.tls_key is None else "--tls-certificate"
            raise ConfigError(f"{missing}: missing; certificate and key are needed together")
        if self.tls_certificate is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.tls_certificate, self.tls_key)
            except (OSError, ssl.SSLError) as e:
                raise ConfigError(f"--tls-certificate: {self.tls_certificate} cannot be used: {e.strerror or e}") from e
        if not all(self.names):
            raise ConfigError("--served-model-name: expected a name, got an empty one")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(f'--cors-origin: expected one like "https://example.org", or *; got {origin!r:.200}')
        self.keys()
        self.chat.check()


def read_keys(file: Path) -> list[bytes]:
    """Return the API keys in a file that only its owner can read, one a line. ConfigError says what is wrong."""
    try:
        text = read_private(file, MAX_KEY_FILE)
    except FileNotFoundError as e:
        raise ConfigError(f"--api-key-file: {file} cannot be read: {e.strerror}") from e
    except ConfigError as e:
        raise ConfigError(f"--api-key-file: {e}") from e
    if len(text) == MAX_KEY_FILE:
        raise ConfigError(f"--api-key-file: {file} has more than {MAX_KEY_FILE - 1} bytes")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        key = line.strip()
        if not key:
            continue
        if len(key) < MIN_KEY or not key.isascii() or len(key.split()) > 1:
            raise ConfigError(
                f"--api-key-file: {file}, line {number}: expected a key of at least {MIN_KEY} ASCII characters "
                "without spaces"
            )
        found.append(key)
    if not found:
        raise ConfigError(f"--api-key-file: {file} has no key; write one on each line")
    return found
