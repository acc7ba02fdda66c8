"""Say what the next token of a sequence depends on, for the compute node that samples it."""

from __future__ import annotations

from array import array

from lamina.front.sequence import Sequence
from lamina.wire.orders import Choice


def choice_for(sequence: Sequence) -> Choice:
    """Return how the token after all that the sequence has is chosen."""
    request = sequence.request
    s, output = request.sampling, sequence.output
    repeats = s.repetition != 1
    counts = bool(s.presence_penalty or s.frequency_penalty)
    return Choice(
        s,
        sequence.context,
        prompt=_prompt(sequence) if repeats else b"",
        answer=_answer(sequence) if repeats or counts else b"",
        banned=_banned(sequence, output) if request.bad_words or len(output) < request.min_tokens else [],
        mask=sequence.mask,
        logprobs=request.logprobs,
    )


def _prompt(sequence: Sequence) -> bytes:
    """Return the different tokens of the prompt, which are found once."""
    if sequence.prompt_bytes is None:
        sequence.prompt_bytes = array("i", dict.fromkeys(sequence.prompt)).tobytes()
    return sequence.prompt_bytes


def _answer(sequence: Sequence) -> bytes:
    """Return the tokens of the answer; only the new ones are converted."""
    known = sequence.answer_array
    known.extend(sequence.output[len(known) :])
    return known.tobytes()


def _banned(sequence: Sequence, output: list[int]) -> list[int]:
    """Return what would end the answer too early, and the last tokens of bad words that it has up to there."""
    banned = set(sequence.stop_tokens) if len(output) < sequence.request.min_tokens else set()
    if sequence.matcher is not None:  # whose masks have no end too early, unless nothing else is left
        banned.difference_update(sequence.matcher.end_tokens)
    for word in sequence.request.bad_words:
        assert not isinstance(word, str), "the session has made tokens of it"
        *before, last = word
        if not before or output[-len(before) :] == before:
            banned.add(last)
    return sorted(banned)
