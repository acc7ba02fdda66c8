"""What is used of pyverbs, which is optional. Its versions differ: 44 is Debian 12's, 59 the newest known."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

from lamina.errors import install_extra
from lamina.transport.lanes import UpgradeError


@functools.cache
def pyverbs() -> Any:
    """Import pyverbs and return the names that are used. Raises UpgradeError where it cannot be imported."""
    try:
        from pyverbs import addr, cq, device, mr, pd, pyverbs_error, qp, wr

        try:
            enums: Any = importlib.import_module("pyverbs.libibverbs_enums")
        except ModuleNotFoundError:
            enums = importlib.import_module("pyverbs.enums")  # before version 56
    except ModuleNotFoundError as error:
        raise UpgradeError(
            f"pyverbs is not installed: {install_extra('rdma')}; or on Debian and Ubuntu apt install python3-pyverbs "
            "and link /usr/lib/python3/dist-packages/pyverbs into this environment"
        ) from error
    except ImportError as error:
        raise UpgradeError(
            f"pyverbs does not fit this machine's libibverbs ({error}): both must come from the same version of "
            "rdma-core, so take both from the distribution, or build pyverbs from that version"
        ) from error
    return SimpleNamespace(
        e=enums,
        Error=pyverbs_error.PyverbsError,
        GID=addr.GID,
        AHAttr=addr.AHAttr,
        GlobalRoute=addr.GlobalRoute,
        CQ=cq.CQ,
        CompChannel=cq.CompChannel,
        Context=device.Context,
        get_device_list=device.get_device_list,
        MR=mr.MR,
        PD=pd.PD,
        QP=qp.QP,
        QPAttr=qp.QPAttr,
        QPCap=qp.QPCap,
        QPInitAttr=qp.QPInitAttr,
        SGE=wr.SGE,
        RecvWR=wr.RecvWR,
        SendWR=wr.SendWR,
    )


STATUSES = {
    "LOC_LEN_ERR": "a write was longer than the port allows",
    "LOC_QP_OP_ERR": "the device could not perform a write",
    "LOC_PROT_ERR": "memory that was to be sent is not registered",
    "WR_FLUSH_ERR": "the queue pair was in error already",
    "BAD_RESP_ERR": "the peer's device answered nonsense",
    "LOC_ACCESS_ERR": "the peer wrote where it may not",
    "REM_INV_REQ_ERR": "the peer's device refused an invalid request",
    "REM_ACCESS_ERR": "the peer's device refused access to its memory (remote access error)",
    "REM_OP_ERR": "the peer's device could not perform a write",
    "RETRY_EXC_ERR": "no answer from the peer's device (retry exceeded)",
    "RNR_RETRY_EXC_ERR": "the peer had no receive ready (receiver-not-ready retry exceeded)",
    "FATAL_ERR": "the device failed",
    "RESP_TIMEOUT_ERR": "the peer's device took too long",
    "GENERAL_ERR": "the device failed in an unknown way",
}


def status_in_words(status: int) -> str:
    """The meaning of a completion's status, for messages."""
    e = pyverbs().e
    for name, words in STATUSES.items():
        if getattr(e, f"IBV_WC_{name}") == status:
            return words
    return f"status {status}"
