"""The formats of strings that a JSON schema may ask for."""

from __future__ import annotations

from typing import Any

_YEAR_MONTH_DAY = (
    r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
"""RFC 3339, section 5.7: each month has its days, and only leap years a 29th of February."""
_TIME = (
    r"(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
    r"|23:59:60(?:\.[0-9]+)?[zZ])"
)
"""Leap seconds come at the end of a day in UTC; they are written so only."""

FORMATS: dict[str, dict[str, Any] | None] = {
    "date": {"pattern": f"^{_YEAR_MONTH_DAY}$"},
    "time": {"pattern": f"^{_TIME}$"},
    "date-time": {"pattern": f"^{_YEAR_MONTH_DAY}[tT]{_TIME}$"},
    "hostname": {"format": "hostname", "maxLength": 253},
    "duration": None,
    "email": None,
    "ipv4": None,
    "ipv6": None,
    "uri": None,
    "uuid": None,
}
"""The schemas that stand for them; None where the library enforces all that the format says."""
