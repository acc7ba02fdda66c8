"""Open the journal of a front, in its place."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lamina.config import ClusterConfig
from lamina.errors import ConfigError
from lamina.front.journal import RequestJournal
from lamina.node.model import ServedModel
from lamina.runtime.host import Host
from lamina.runtime.workers import BackgroundWorkers

FILE = "requests.journal"


def open_journal(
    config: ClusterConfig, served: ServedModel, host: Host, workers: BackgroundWorkers
) -> RequestJournal | None:
    """Return the journal that the file asks for, which is still to be read; None for one that keeps nothing.

    ``workers`` wait for the disk, if the journal has to. ConfigError if it cannot be opened, StorageError if another
    front has it.
    """
    recovery, model = config.recovery, served.facts.fingerprint
    if recovery.journal == "off" or not recovery.lease:  # nobody could come back for anything
        return None
    try:
        file = host.open_log(journal_folder(config, model) / FILE)
    except ConfigError as e:
        raise ConfigError(
            f'recovery.journal_dir: {e}; name a folder that can be written, or set journal = "off"'
        ) from e
    syncing = workers if recovery.journal == "machine" else None
    return RequestJournal(file, node=config.front.name, model=model, workers=syncing)


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
