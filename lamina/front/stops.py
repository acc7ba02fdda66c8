"""Find the texts that end an answer, while it comes piece by piece."""

from __future__ import annotations

from collections.abc import Iterable


class StopStrings:
    """Looks for the first place where one of several texts ends in an answer; of those that end there, for the longest.

    Text that may be the beginning of one is held back. What has been given never belongs to one. It takes time in
    proportion to the length of the answer: each text is matched by the algorithm of Knuth, Morris and Pratt.
    """

    def __init__(self, texts: Iterable[str], *, include: bool = False) -> None:
        """``include``: what is given ends behind the text that was found, not before it."""
        self.found: str | None = None
        """The text that was found. Then no more is given."""
        self._include = include
        self._matchers = [_Matcher(text) for text in dict.fromkeys(texts)]
        self._held = ""

    def push(self, text: str, *, active: bool = True) -> str:
        """Return what is certain, now that ``text`` has come. A text that ends in a part that is not ``active`` is
        none."""
        if not self._matchers or not text:
            return text
        if self.found is not None:
            return ""
        end = len(text)
        for matcher in self._matchers:
            stop = matcher.push(text, end, active)
            if stop is not None and (self.found is None or stop < end or len(matcher.text) > len(self.found)):
                self.found, end = matcher.text, stop
        text = self._held + text
        if self.found is not None:
            end += len(self._held)
            self._held = ""
            return text[: end if self._include else end - len(self.found)]
        certain = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """Return what was held back, as the answer has ended without it."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Follows how much of the beginning of ``text`` the answer ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        """The length of the longest beginning of the text that the answer ends with, and that is not all of it."""
        self._borders = [0, 0]
        """For each number of characters from the beginning of the text: the longest part, less than the whole, that is
        both their beginning and their end."""
        border = 0
        for character in text[1:]:
            while border and text[border] != character:
                border = self._borders[border]
            border += text[border] == character
            self._borders.append(border)

    def push(self, text: str, end: int, active: bool) -> int | None:
        """Go on with the first ``end`` characters of ``text``; return where in it what is sought ends first, if that
        counts."""
        sought, borders, matched, at = self.text, self._borders, self.matched, 0
        while at < end:
            if not matched:
                at = text.find(sought[0], at, end)
                if at < 0:
                    break
            character = text[at]
            while matched and sought[matched] != character:
                matched = borders[matched]
            matched += sought[matched] == character
            at += 1
            if matched == len(sought):
                if active:
                    return at
                matched = borders[matched]
        self.matched = matched
        return None
