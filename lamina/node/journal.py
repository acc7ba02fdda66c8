"""Open the journal of a front in its place, and have another node keep a copy."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection
from pathlib import Path

from lamina.compute.peer_control import PeerControl
from lamina.config import ClusterConfig
from lamina.errors import ConfigError
from lamina.front.journal import RequestJournal, writer_of
from lamina.front.members import Members, State
from lamina.front.standby import JournalCopy
from lamina.node.model import ServedModel
from lamina.node.neighbours import Neighbours
from lamina.runtime.host import Host
from lamina.runtime.storage import LogFile
from lamina.runtime.workers import BackgroundWorkers
from lamina.wire.orders import Records

log = logging.getLogger("lamina.compute")

FILE = "requests.journal"
"""The journal of the first compute node of the cluster file."""
OF_OTHERS = "requests-{name}.journal"
"""That of any other one, which may be on the same machine."""


def open_journal(
    config: ClusterConfig, served: ServedModel, name: str, host: Host, workers: BackgroundWorkers
) -> RequestJournal | None:
    """Return the journal that the file asks for, of the node ``name``; it is still to be read. None for one that keeps
    nothing.

    ``workers`` wait for the disk, if the journal has to. ConfigError if it cannot be opened, StorageError if another
    front has it.
    """
    if not _keeps(config):
        return None
    syncing = workers if config.recovery.journal == "machine" else None
    return RequestJournal(
        _open_file(config, served, name, host), node=name, model=served.facts.fingerprint, workers=syncing
    )


def open_copy(
    config: ClusterConfig, served: ServedModel, name: str, host: Host, workers: BackgroundWorkers
) -> JournalCopy:
    """Return the copy of the front's journal for the node ``name``, in the file that would be its own journal if the
    cluster file asks for one that outlives the machine. Errors are those of `open_journal`."""
    on_disk = _keeps(config) and config.recovery.journal == "machine"
    return JournalCopy(_open_file(config, served, name, host) if on_disk else None, workers)


def was_front(config: ClusterConfig, served: ServedModel, name: str, host: Host) -> bool:
    """Return whether the node ``name`` has a journal as a front. Errors are those of `open_journal`, and OSError."""
    if not _keeps(config):
        return False
    file = _open_file(config, served, name, host)
    try:
        return writer_of(file.read()) == name
    finally:
        file.close()


def _keeps(config: ClusterConfig) -> bool:
    """Return whether anybody could come back for anything."""
    return config.recovery.journal != "off" and config.recovery.lease > 0


def _open_file(config: ClusterConfig, served: ServedModel, name: str, host: Host) -> LogFile:
    file = FILE if name == config.front.name else OF_OTHERS.format(name=name)
    try:
        return host.open_log(journal_folder(config, served.facts.fingerprint) / file)
    except ConfigError as e:
        raise ConfigError(
            f'recovery.journal_dir: {e}; name a folder that can be written, or set journal = "off"'
        ) from e


def journal_folder(config: ClusterConfig, model: str) -> Path:
    """Return where the journal lies: in the folder that the file names, else in one of the cluster's own.

    A cluster is the same as long as it has this ``model``, by its fingerprint, and compute nodes of these names and
    addresses in its file.
    """
    if config.recovery.journal_dir is not None:
        return config.file.parent / config.recovery.journal_dir
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError as e:
        raise ConfigError("this user has no home folder") from e
    cluster = "\n".join([model, *(f"{node.name} {node.address}" for node in config.compute_nodes)])
    return state / "lamina" / hashlib.blake2b(cluster.encode(), digest_size=8).hexdigest()


class Standby:
    """Has another compute node keep a copy of the front's journal, on the node's loop of the front: the first one of
    the file that serves."""

    def __init__(
        self, members: Members, neighbours: Neighbours, journal: RequestJournal | None, names: Collection[str]
    ) -> None:
        """Begin with the nodes that serve now. ``journal`` is None where none is kept; ``names`` are those of the nodes
        that can be the standby."""
        self._names = names
        self._members = members
        self._neighbours = neighbours
        self._journal = journal
        self._chosen: PeerControl | None = None
        self.choose()

    def choose(self) -> None:
        """Choose anew, as members have changed."""
        peers, serving = self._neighbours.peers, self._members.in_state("compute", State.SERVING)
        able = (peers[member] for member in serving if member in peers)
        chosen = next((peer for peer in able if peer.name in self._names), None)
        if chosen is self._chosen:
            return
        if self._chosen is not None:
            self._chosen.send(Records(kind="none"))
        self._chosen = chosen
        if chosen is not None:
            log.info("event=standby member=%s", chosen.name)
            if self._journal is None:
                chosen.send(Records(kind="all"))
        if self._journal is not None:
            self._journal.mirror(
                None if chosen is None else lambda kind, data: chosen.send(Records(kind=kind, data=data))
            )
