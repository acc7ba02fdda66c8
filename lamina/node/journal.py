"""Open the journal of a front, in its place."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lamina.config import ClusterConfig
from lamina.errors import StorageError
from lamina.front.journal import RequestJournal
from lamina.node.model import ServedModel
from lamina.runtime.host import Host
from lamina.runtime.workers import BackgroundWorkers

FILE = "requests.journal"


def open_journal(
    config: ClusterConfig, served: ServedModel, host: Host, workers: BackgroundWorkers
) -> RequestJournal | None:
    """Return the journal that the file asks for, which is still to be read; None for one that keeps nothing.

    ``workers`` wait for the disk, if the journal has to. StorageError if it cannot be opened, or another front has it.
    """
    recovery, model = config.recovery, served.facts.fingerprint
    if recovery.journal == "off" or not recovery.lease:  # nobody could come back for anything
        return None
    try:
        file = host.open_log(journal_folder(config, model) / FILE)
    except StorageError as e:
        raise StorageError(f'recovery.journal_dir: {e}; name a folder of this user\'s, or set journal = "off"') from e
    syncing = workers if recovery.journal == "machine" else None
    return RequestJournal(file, node=config.front.name, model=model, workers=syncing)


def journal_folder(config: ClusterConfig, model: str) -> Path:
    """Return where the journal lies: in the folder that the file names, else in one of the cluster's own.

    A cluster is the same as long as it has this ``model``, by its fingerprint, and nodes of these names and addresses.
    """
    if config.recovery.journal_dir is not None:
        return config.file.parent / config.recovery.journal_dir
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError as e:
        raise StorageError("this user has no home folder") from e
    cluster = "\n".join([model, *(f"{node.name} {node.address}" for node in config.node)])
    return state / "lamina" / hashlib.blake2b(cluster.encode(), digest_size=8).hexdigest()
