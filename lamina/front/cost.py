"""Predict the cost of a step from the measured times of earlier steps. This is pure Python: the caller has the clock.

Compute time is a table over the tokens of a step. For few tokens a matrix product always costs the same, because the
weights are read once; for more it grows. Attention and wire time are linear: each row and each token of context adds
its bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

MIN_GAIN = 0.05
"""A further batch in flight is worth its overhead if steps get faster by this share."""
MIN_GAIN_TO_STAY = 0.02
"""A batch that is already in flight stays if steps would be slower by this share without it. This is less than
`MIN_GAIN`, so that the number of batches does not change with every request."""

_WEIGHT = 0.02
"""The weight of a new observation among many."""
_TRUSTED = 8
"""After this many observations an outlier can be told from the others."""
_OUTLIER = 3.0
"""An observation counts as an outlier if its deviation is more than this many times the usual one."""
_TICK_S = 1e-6
"""Measured times are at least about this long."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """Says how large a step is: decode rows, prompt tokens, and the tokens that all its decode rows attend to
    together."""

    rows: int = 0
    prompt_tokens: int = 0
    context_tokens: int = 0

    def part(self, count: int) -> StepLoad:
        """Return the largest part, if the load is divided evenly over ``count`` batches."""
        return StepLoad(-(-self.rows // count), -(-self.prompt_tokens // count), -(-self.context_tokens // count))


@dataclass(frozen=True, slots=True)
class StepCost:
    """Holds the seconds of a step on the compute node, on the wire, on the busiest memory node, and on the memory nodes
    in the mean. The last two differ where sequences lie on one memory node each."""

    compute_s: float
    wire_s: float
    attention_s: float
    memory_s: float

    @property
    def alone_s(self) -> float:
        """Return the time of the step when no other one is in flight, so that nothing overlaps."""
        return self.compute_s + self.wire_s + self.attention_s


class CostModel:
    """Predicts the times of steps from those of measured ones, in memory of a fixed size.

    A larger load never gets a smaller estimate. Before the first observation (see `lamina.front.fit`) the cost is the
    number of rows, plus a little for context, in an arbitrary unit. The ``compute_nodes`` share the work of all batches
    in flight; each of them works on one batch after the other.
    """

    def __init__(self, compute_nodes: int = 1) -> None:
        self._compute_nodes = compute_nodes
        self._compute = _TokenTable()
        self._wire = _Linear(2)
        self._attention, self._memory = _Linear(3), _Linear(3)

    @property
    def fitted(self) -> bool:
        """Return whether steps with decode rows have been observed."""
        return self._attention.observed > 0

    def observe(
        self,
        rows: int,
        prompt_tokens: int,
        context_tokens: int,
        compute_s: float,
        attention_s: float,
        wire_s: float = 0.0,
        memory_s: float | None = None,
    ) -> None:
        """Learn from a step of this size that took these times. Times that are negative or not finite are ignored.

        ``memory_s`` is the mean of the memory nodes, by default what the busiest one took.
        """
        tokens = rows + prompt_tokens
        if tokens > 0 and _is_time(compute_s):
            self._compute.observe(tokens, compute_s)
        if rows > 0 and _is_time(attention_s):
            self._attention.observe((1.0, rows, context_tokens), attention_s)
        if memory_s is None:
            memory_s = attention_s
        if rows > 0 and _is_time(memory_s):
            self._memory.observe((1.0, rows, context_tokens), memory_s)
        if rows > 0 and _is_time(wire_s):
            self._wire.observe((1.0, rows), wire_s)

    def cost(self, load: StepLoad) -> StepCost:
        """Return the expected cost of a step."""
        tokens = load.rows + load.prompt_tokens
        if not self.fitted:
            attention_s = 1e-4 * load.context_tokens
            return StepCost(tokens, 0.0, attention_s, attention_s)
        compute_s = self._compute.at(tokens) if tokens else 0.0
        if not load.rows:
            return StepCost(compute_s, 0.0, 0.0, 0.0)
        size = 1.0, load.rows, load.context_tokens
        return StepCost(compute_s, self._wire.at(size[:2]), self._attention.at(size), self._memory.at(size))

    def step_s(self, loads: Sequence[StepLoad], each: int = 1) -> float:
        """Return the seconds until each batch has made a step, if ``each`` batches of every one of these loads are in
        flight.

        This is the time of the busier side, or that of the slowest batch alone. While a batch waits for the memory
        node that has most of it, the others have work of other batches, so a memory node is as busy as the mean.
        """
        costs = [self.cost(load) for load in loads]
        busy = min(self._compute_nodes, each * len(costs))
        compute_s = each * math.fsum(cost.compute_s for cost in costs) / max(1, busy)
        memory_s = each * math.fsum(cost.memory_s for cost in costs)
        return max(compute_s, memory_s, max((cost.alone_s for cost in costs), default=0.0))

    def batches(self, load: StepLoad, *, least: int, most: int, present: int) -> int:
        """Return how many batches, from ``least`` to ``most``, to divide a load over, while ``present`` are in use.

        The result is the smallest number that no larger one beats clearly; before the first observation it is ``most``.
        """
        if not self.fitted:
            return most
        chosen, chosen_s = least, self._together_s(load, least)
        for count in range(least + 1, max(least, min(most, load.rows)) + 1):
            step_s = self._together_s(load, count)
            if step_s * (1 + (MIN_GAIN_TO_STAY if count <= present else MIN_GAIN)) < chosen_s:
                chosen, chosen_s = count, step_s
        return chosen

    def _together_s(self, load: StepLoad, batches: int) -> float:
        """Return `step_s` for a load that is divided evenly over batches."""
        return self.step_s([load.part(batches)], each=batches)


class _TokenTable:
    """Represents time as a function of the number of tokens: means in bins of half an octave, joined by lines that
    never fall."""

    def __init__(self) -> None:
        self._bins: dict[int, _Bin] = {}
        self._points: list[tuple[float, float]] = []

    def observe(self, tokens: int, seconds: float) -> None:
        number = round(2 * math.log2(tokens))
        found = self._bins.setdefault(number, _Bin())
        found.count += 1
        weight = max(1 / found.count, _WEIGHT)
        found.tokens += weight * (tokens - found.tokens)
        if found.count <= _TRUSTED:
            found.early.append(seconds)
            found.seconds = median(found.early)
        else:
            found.seconds += weight * (found.deviation.clip(seconds, found.seconds) - found.seconds)
        self._points = []

    def at(self, tokens: int) -> float:
        points = self._points = self._points or self._fit()
        if not points:
            return 0.0
        if tokens <= points[0][0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if tokens <= x1:
                return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
        # Beyond the last point the last slope goes on, but never quite level. An estimate that is too low corrects
        # itself, since it leads to larger steps, which are then observed.
        x, y = points[-1]
        steep = 0.1 * y / x
        if len(points) > 1:
            steep = max(steep, (y - points[-2][1]) / (x - points[-2][0]))
        return y + steep * (tokens - x)

    def _fit(self) -> list[tuple[float, float]]:
        """Compute the weighted least-squares fit that never falls (pool adjacent violators)."""
        pools: list[tuple[float, float, list[float]]] = []
        for found in sorted(self._bins.values(), key=lambda b: b.tokens):
            weight, mean, xs = float(min(found.count, 1 / _WEIGHT)), found.seconds, [found.tokens]
            while pools and pools[-1][1] > mean:
                before, other, others = pools.pop()
                mean = (before * other + weight * mean) / (before + weight)
                weight, xs = before + weight, others + xs
            pools.append((weight, mean, xs))
        return [(x, mean) for _, mean, xs in pools for x in xs]


class _Deviation:
    """Tracks how far observations usually deviate from expected times, as the logarithm of a factor.

    When all observations begin to deviate, as they do when the machine changes, that becomes usual after some tens of
    them.
    """

    def __init__(self) -> None:
        self._spread = 0.3

    def clip(self, seconds: float, expected: float) -> float:
        """Return the observation, or the limit of what is no outlier if it is beyond that."""
        off = math.log(max(seconds, _TICK_S) / max(expected, _TICK_S))
        limit = _OUTLIER * self._spread
        off = min(max(off, -limit), limit)
        self._spread = max(0.02, self._spread + 0.1 * (abs(off) - self._spread))
        return max(expected, _TICK_S) * math.exp(off)


@dataclass(slots=True)
class _Bin:
    count: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    early: list[float] = field(default_factory=list)
    """The first observations, from which the usual deviation is not known yet."""
    deviation: _Deviation = field(default_factory=_Deviation)


class _Linear:
    """Fits non-negative least squares to decayed observations of a few features.

    With so few features, every set of coefficients that may be above 0 is tried. Lawson and Hanson (1974) show that one
    of these sets gives the solution.
    """

    def __init__(self, features: int) -> None:
        self.observed = 0
        self._deviation = _Deviation()
        self._squares = [[0.0] * features for _ in range(features)]
        self._products = [0.0] * features
        self._coefficients: list[float] | None = None

    def observe(self, features: Sequence[float], seconds: float) -> None:
        size = max(seconds, _TICK_S)
        if self.observed >= _TRUSTED:
            size = max(self.at(features), _TICK_S)
            seconds = self._deviation.clip(seconds, size)
        self.observed += 1
        # Errors are relative: an error of a tenth is as bad for a short step as for a long one.
        features, seconds = [x / size for x in features], seconds / size
        for row, x in zip(self._squares, features, strict=True):
            row[:] = [(1 - _WEIGHT) * old + x * other for old, other in zip(row, features, strict=True)]
        self._products = [(1 - _WEIGHT) * old + x * seconds for old, x in zip(self._products, features, strict=True)]
        self._coefficients = None

    def at(self, features: Sequence[float]) -> float:
        if self._coefficients is None:
            self._coefficients = self._fit()
        return math.fsum(c * x for c, x in zip(self._coefficients, features, strict=True))

    def _fit(self) -> list[float]:
        size = len(self._products)
        # Features of very different size are scaled, which keeps the equations well conditioned.
        scale = [math.sqrt(self._squares[i][i]) or 1.0 for i in range(size)]
        squares = [[self._squares[i][j] / (scale[i] * scale[j]) for j in range(size)] for i in range(size)]
        products = [self._products[i] / scale[i] for i in range(size)]
        best, least = [0.0] * size, 0.0
        for count in range(1, size + 1):
            for chosen in itertools.combinations(range(size), count):
                solution = _solve([[squares[i][j] for j in chosen] for i in chosen], [products[i] for i in chosen])
                if min(solution) < 0:
                    continue
                error = -math.fsum(x * products[i] for x, i in zip(solution, chosen, strict=True))
                if error < least:
                    least = error
                    best = [0.0] * size
                    for x, i in zip(solution, chosen, strict=True):
                        best[i] = x / scale[i]
        return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a positive system with a diagonal of ones by Gaussian elimination; a little is added to the diagonal to
    keep it regular."""
    size = len(right)
    rows = [[x + (1e-9 if i == j else 0.0) for j, x in enumerate(row)] + [right[i]] for i, row in enumerate(matrix)]
    for i in range(size):
        for below in rows[i + 1 :]:
            factor = below[i] / rows[i][i]
            for j in range(i, size + 1):
                below[j] -= factor * rows[i][j]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = math.fsum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution


def _is_time(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds >= 0


class ThroughputEstimate:
    """Estimates how many requests are answered per second, from the times at which they end, on any clock."""

    def __init__(self) -> None:
        self._per_request_s: float | None = None
        self._last: float | None = None

    def note_ended(self, now: float, requests: int) -> None:
        """Note that ``requests`` requests have ended together at the time ``now``."""
        if self._last is not None:
            each = (now - self._last) / requests
            self._per_request_s = each if self._per_request_s is None else 0.9 * self._per_request_s + 0.1 * each
        self._last = now

    def note_idle(self) -> None:
        """Note that no request is left, so that the time until the next one ends says nothing."""
        self._last = None

    def retry_after_s(self, waiting: int) -> float:
        """Return when a client should try again while ``waiting`` requests wait: when an eighth of them has been
        answered."""
        return max(1.0, math.ceil((self._per_request_s or 0.0) * waiting / 8))
