"""Short stories from a seeded grammar: the text that the demo checkpoint learns to write.

The grammar is the file ``stories.txt``, written like this::

    hint: "What about the {tool}?" asked {friend}.
      | Then {hero} remembered {giver}, and the {tool}.

A symbol stands for one of its alternatives, chosen at random, with the symbols inside it expanded in turn. A
capitalised symbol, ``{Her}``, capitalises its expansion, and ``¶`` starts a new paragraph. Before a tale is told, its
facts (who, with whom, where to, what with) are settled: their symbols keep one alternative, so that they read the same
at every mention, and a model that continues the tale must look back to know them.

Each tale is an errand with a cause, a hurdle on the way, and a way past it that was prepared earlier: the hero either
received a tool, or helped a creature in trouble that returns the favour. A document is one tale, or a book of several
tales about the same hero and friend, whose last sentence recalls the reward of every tale.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

Rules = Mapping[str, Sequence[str]]
"""The alternatives of each symbol."""

DEMO_PROMPT = (
    "Once upon a time, a stubborn baker named Mira lived in a small harbour on a rocky island. She baked brown bread "
    "before the sun came up, and she was good at it. Wherever Mira went, a fox named Button went too. The greatest "
    "treasure of Mira was a silk kite, a present from her uncle."
)
"""A prompt that the demo checkpoint continues well; after most others it mixes up names and colours on the way."""

MAX_TALES = 6
"""The number of tales in the longest book; they fit into the demo checkpoint's context of 2,048 tokens."""

ORDINALS = ("first", "second", "third", "fourth", "fifth")


def parse(text: str) -> tuple[Rules, ...]:
    """Read rules in the notation above, one set of rules per block; blank lines separate blocks."""
    return tuple(
        {
            symbol: tuple(" ".join(words.split()).replace(" ¶ ", "\n\n") for words in alternatives.split("|"))
            for symbol, alternatives in re.findall(r"^(\w+):(.*(?:\n +.*)*)", block, re.MULTILINE)
        }
        for block in text.strip().split("\n\n")
    )


@cache
def grammar() -> Mapping[str, tuple[Rules, ...]]:
    """Read ``stories.txt`` and return the sets of rules in each section."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    _, *parts = re.split(r"^\[(\w+)\]\n", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    return {name: parse(rules) for name, rules in zip(parts[::2], parts[1::2], strict=True)}


def expand(text: str, rules: Rules, rng: random.Random) -> str:
    """Replace every ``{symbol}`` in ``text`` with one of its alternatives, expanded in turn."""

    def alternative(match: re.Match[str]) -> str:
        symbol = match[1]
        chosen = expand(rng.choice(rules[symbol.lower()]), rules, rng)
        return chosen[0].upper() + chosen[1:] if symbol[0].isupper() else chosen

    return re.sub(r"\{(\w+)\}", alternative, text)


def settle(rules: Rules, rng: random.Random, *symbols: str) -> Rules:
    """Return ``rules`` with one alternative left for each of ``symbols``, and a rule ``a_symbol`` with its article."""
    settled = dict(rules)
    for symbol in symbols:
        fact = expand(f"{{{symbol}}}", settled, rng)
        settled[symbol] = (fact,)
        settled[f"a_{symbol}"] = (f"an {fact}" if fact[0] in "aeiou" else f"a {fact}",)
    return settled


def cast(rng: random.Random) -> Rules:
    """Settle what all tales of a document share: the hero, the friend and their home."""
    sections = grammar()
    rules = {**sections["world"][0], **sections["tale"][0]}
    for section in ("genders", "homes", "trades"):
        rules |= rng.choice(sections[section])
    return settle(rules, rng, "hero", "trait", "friend", "species")


def tell(rules: Rules, rng: random.Random) -> str:
    """Tell one tale of a settled cast."""
    plot, hurdles, helper = rng.choice((("gift", "tool_hurdles", "tool"), ("favour", "creature_hurdles", "creature")))
    sections = grammar()
    rules = {**rules, **sections[plot][0], **rng.choice(sections[hurdles]), **rng.choice(sections["errands"])}
    return expand("{tale}", settle(rules, rng, "season", "place", "elder", "giver", "colour", helper), rng)


def story(rng: random.Random) -> str:
    """Tell one tale."""
    return tell(cast(rng), rng)


def book(rng: random.Random, tales: int) -> str:
    """Tell 2 to ``MAX_TALES`` tales about one cast; the end recalls the keepsakes of all tales."""
    rules = {**cast(rng), **grammar()["book"][0]}
    keepsakes = [f"{rng.choice(rules['colour'])} {thing}" for thing in rng.sample(rules["keepsakes"], tales)]
    parts = [expand("{title}", rules, rng)]
    for ordinal, keepsake in zip((*ORDINALS[: tales - 1], "last"), keepsakes, strict=True):
        rules |= {"ordinal": (ordinal,), "keepsake": (keepsake,)}
        parts += [expand("{heading}", rules, rng), tell(rules, rng)]
    parts.append(expand("{ending}", rules | {"earlier": (series(keepsakes[:-1]),)}, rng))
    return "\n\n".join(parts)


def series(nouns: Sequence[str]) -> str:
    """Join ``nouns`` as they read after a "the": "cup", "cup and the box", "cup, the box and the spoon"."""
    *front, last = nouns
    return f"{', the '.join(front)} and the {last}" if front else last


def documents(seed: int, *, books: float) -> Iterator[str]:
    """Yield documents without end, the same ones for the same seed: books with probability ``books``, else one tale."""
    rng = random.Random(seed)  # noqa: S311 - stories, not secrets
    while True:
        yield book(rng, rng.randint(2, MAX_TALES)) if rng.random() < books else story(rng)
