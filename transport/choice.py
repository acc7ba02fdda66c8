"""The choice of a transport, from what both nodes asked for and what both can do."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lamina.errors import HandshakeError
from lamina.transport.lanes import UpgradeError
from lamina.transport.options import Options

TRANSPORTS = ("shm", "rdma", "tcp")
"""Modules and packages of this package, in the order in which ``auto`` prefers them."""

Offers = Mapping[str, Mapping[str, Any]]
"""What an end can do, by transport: plain values, or ``{"missing": reason}``."""


@dataclass(frozen=True)
class Party:
    """What the choice has to know about one end."""

    name: str
    kind: str
    offers: Offers


@dataclass
class TransportChoice:
    """The transports to try, in order, and why the others are impossible."""

    asked: str
    candidates: list[str]
    reasons: list[str]

    def told(self, taken: str) -> str:
        """A sentence for the log about the choice; why something worse than ``taken`` was impossible is left out."""
        worse = TRANSPORTS[TRANSPORTS.index(taken) + 1 :] if taken in TRANSPORTS else ()
        reasons = [reason for reason in self.reasons if not reason.startswith(tuple(f"{name}: " for name in worse))]
        return "; ".join([self.asked, *reasons, f"took {taken}"])


def offers(options: Options) -> dict[str, dict[str, Any]]:
    """What this end can do. Transports for which it did not ask are not examined."""
    found: dict[str, dict[str, Any]] = {}
    for name in TRANSPORTS:
        if options.kind in ("auto", name):
            try:
                found[name] = importlib.import_module(f"lamina.transport.{name}").offer(options)
            except UpgradeError as error:
                found[name] = {"missing": str(error)[:500]}
    return found


def choose(connecting: Party, listening: Party) -> TransportChoice:
    """Choose, with the same result on both ends. Raises HandshakeError where a demand cannot be met."""
    asked = f"asked: {connecting.kind} ({connecting.name}), {listening.kind} ({listening.name})"
    if connecting.kind == "control":
        return TransportChoice(asked, [], [])
    demanded = {party.kind for party in (connecting, listening)} - {"auto"}
    if len(demanded) > 1 or "control" in demanded:
        raise HandshakeError(
            f"{connecting.name} demands transport {connecting.kind}, {listening.name} demands {listening.kind}: "
            "configure one kind, or auto"
        )
    choice = TransportChoice(asked, [], [])
    for name in demanded or TRANSPORTS:
        reason = _obstacle(name, connecting, listening)
        if reason:
            choice.reasons.append(f"{name}: {reason}")
        else:
            choice.candidates.append(name)
    if not choice.candidates:
        raise HandshakeError(f"no transport is possible ({asked}): {'; '.join(choice.reasons)}")
    return choice


def _obstacle(name: str, connecting: Party, listening: Party) -> str:
    """The reason why transport ``name`` is impossible; empty if it may be possible."""
    for party in (connecting, listening):
        offer = party.offers.get(name, {"missing": "not offered"})
        if "missing" in offer:
            return f"{party.name}: {offer['missing']}"
    if name == "shm" and connecting.offers[name].get("host") != listening.offers[name].get("host"):
        return "the nodes are not on one host"
    return ""
