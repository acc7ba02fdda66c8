"""Every error that Lamina raises on purpose, in one tree.

    LaminaError                   catch this and nothing of Lamina's escapes
    ├── UsageError                the caller's mistake; the command line exits with status 2
    │   ├── ConfigError           a configuration file or an option says something impossible
    │   ├── RequestError          a request that cannot be served as it was asked
    │   └── HttpError             an HTTP request is answered with an error; names the status
    ├── CheckpointError           a checkpoint directory is missing something or is damaged
    │   └── UnsupportedModelError a model needs what Lamina cannot represent; names the feature
    ├── CapacityError             a KV cache, a block pool or a queue is too small or full
    ├── TransportError            bytes could not be moved
    │   ├── ConnectError          no connection within the deadline
    │   ├── HandshakeError        the peer is not what was expected: version, role, model, layout
    │   ├── ProtocolError         the peer sent something that the protocol does not allow
    │   └── PeerLostError         the peer died, closed the connection or fell silent
    │       └── PeerSilentError   the peer fell silent: it hangs, or the network is cut
    ├── MoveError                 blocks could not be moved from one memory node to another
    ├── DeadlineError             an answer took longer than its request allowed
    ├── NodeError                 a node is lost, or reports a failure of its own; names the node
    │   ├── SpaceLostError        a memory node no longer has what a step needs of some sequences
    │   ├── StaleOrderError       a compute node was told to run a step of members that have changed
    │   ├── SupersededError       a memory node serves this tenant in a later term
    │   └── NotFrontError         clients have to talk to another compute node
    └── DeadlockError             a simulation in which nothing can happen any more

A message says what happened, where, the value seen, the value allowed and what to do, in one sentence or two.
"""

from __future__ import annotations


class LaminaError(Exception):
    """All errors of Lamina derive from this class. The command line ends with ``exit_status``."""

    exit_status = 1


class UsageError(LaminaError):
    """The caller asked for something impossible."""

    exit_status = 2


class ConfigError(UsageError):
    """A configuration file or option is wrong; the message names file, table and key."""


class RequestError(UsageError):
    """A request cannot be served as it was asked: empty prompt, prompt longer than the context, bad sampling."""


class HttpError(UsageError):
    """An HTTP request gets this error as its answer, in the form of OpenAI's API.

    ``param`` names the parameter that is wrong, if it is one. ``retry_after_s`` says after how many seconds the same
    request may succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.retry_after_s = retry_after_s


class CheckpointError(LaminaError):
    """A checkpoint directory lacks a file or a tensor, holds one too many, or is damaged."""


class UnsupportedModelError(CheckpointError):
    """The model needs a feature that Lamina cannot represent; the message names it."""


class CapacityError(LaminaError):
    """There is not enough KV cache, queue or region for a request; the message gives both numbers.

    ``retry_after_s`` says after how many seconds there may be enough, if that is known.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageError(LaminaError):
    """What has to be kept cannot be written, as on a full disk; the message names the file."""


class TransportError(LaminaError):
    """Bytes could not be moved between two nodes."""


class ConnectError(TransportError):
    """No connection could be made within the deadline."""


class HandshakeError(TransportError):
    """The peer speaks another protocol version or is not the node that was expected."""


class ProtocolError(TransportError):
    """The peer sent bytes that the protocol does not allow; the link is finished."""


class PeerLostError(TransportError):
    """The peer died, closed the connection or was silent for longer than ``peer_timeout``."""


class PeerSilentError(PeerLostError):
    """The peer was silent for longer than ``peer_timeout``, while its connection was open."""


class MoveError(LaminaError):
    """Blocks could not be moved from one memory node to another. Nothing has changed, and both nodes may be well."""


class DeadlineError(LaminaError):
    """An answer was not complete within the ``deadline_s`` of its request, which was cancelled."""


class NodeError(LaminaError):
    """A node failed; ``node`` is its name in the configuration."""

    def __init__(self, message: str, *, node: str) -> None:
        super().__init__(message)
        self.node = node

    @classmethod
    def lost(cls, role: str, name: str, reason: object) -> NodeError:
        """Return the error for a node of a role, ``memory`` or ``compute``, that is gone for ``reason``."""
        return cls(f"{role} node {name} was lost: {reason}", node=name)

    @classmethod
    def failed(cls, role: str, name: str, error: BaseException) -> NodeError:
        """Return the error for a node that has met an error that it did not expect."""
        return cls(f"{role} node {name} failed: {error!r}", node=name)


class SpaceLostError(NodeError):
    """A node gave up a step, as it does not have, and will not get, all that the step needs of ``sequences``."""

    def __init__(self, node: str, sequences: list[int]) -> None:
        super().__init__(f"{node} does not have all of the sequences {sequences}", node=node)
        self.sequences = sequences


class StaleOrderError(NodeError):
    """A compute node did not run a step, as it was ordered for members that have changed since."""


class SupersededError(NodeError):
    """The memory node ``node`` has heard from this tenant's front in the later term ``term``.

    ``holder`` names the compute node that is that front, if it still is and is another one. While it is, no later term
    helps.
    """

    def __init__(self, message: str, *, node: str, term: int, holder: str = "") -> None:
        super().__init__(message, node=node)
        self.term = term
        self.holder = holder


class NotFrontError(NodeError):
    """The compute node ``node`` is not the front, and answers no requests. ``address`` is that of the front, as far as
    the node knows, or nothing."""

    def __init__(self, message: str, *, node: str, address: str = "") -> None:
        super().__init__(message, node=node)
        self.address = address


class DeadlockError(LaminaError):
    """On a virtual clock, tasks wait and nothing is left that could wake them; the message names the tasks."""


def install_extra(extra: str) -> str:
    """Return how to install the optional dependencies that ``pyproject.toml`` calls ``extra``.

    It names no distribution: until one is published under the project's name, an index may serve anything under it.
    """
    return f"in a checkout of Lamina, run: pip install '.[{extra}]'"


def first_error(error: BaseException) -> BaseException:
    """Return the first error in a group of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
