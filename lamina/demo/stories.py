"""Short stories out of a seeded grammar: the text that the demo checkpoint learns to write.

The grammar is data, written like this::

    hint: "What about the {tool}?" asked {friend}.
      | Then {hero} remembered {giver}, and the {tool}.

A symbol stands for one of its alternatives, chosen by chance, with the symbols inside it expanded in turn. A
capitalised symbol, ``{Her}``, capitalises what it expands to, and ``¶`` starts a new paragraph. Before a tale is told,
its facts (who, with whom, where to, what with) are settled: their symbols keep one alternative, so that they read the
same at every mention, and whoever continues the tale must look back to know them.

Each tale is an errand with a cause, a hurdle on the way, and a way past it that was prepared earlier: either the hero
was given a tool, or helped a creature in trouble that returns the favour. A document is one tale, or a book of several
tales about the same hero and friend, whose last sentence recalls what every tale earned.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence

Rules = Mapping[str, Sequence[str]]
"""The alternatives of each symbol."""

DEMO_PROMPT = (
    "Once upon a time, a stubborn baker named Mira lived in a small harbour on a rocky island. She baked brown bread "
    "before the sun came up, and she was good at it. Wherever Mira went, a fox named Button went too. The greatest "
    "treasure of Mira was a silk kite, a present from her uncle."
)
"""A prompt that the demo checkpoint continues well; after most others it mixes up names and colours on the way."""

MAX_TALES = 6
"""Tales in the longest book; all of them fit into the 2,048 tokens that the demo checkpoint can look back on."""


def parse(grammar: str) -> tuple[Rules, ...]:
    """Read rules in the notation above, one set of rules per block; blank lines separate blocks."""
    return tuple(
        {
            symbol: tuple(" ".join(text.split()).replace(" ¶ ", "\n\n") for text in alternatives.split("|"))
            for symbol, alternatives in re.findall(r"^(\w+):(.*(?:\n +.*)*)", block, re.MULTILINE)
        }
        for block in grammar.strip().split("\n\n")
    )


(WORLD,) = parse("""
place: the silver lake | the old tower | the pine forest | the green valley | the windy hill |
  the hidden garden | the white cliffs | the stone circle | the northern islands | the seven waterfalls |
  the ruined castle | the great oak
colour: red | blue | green | golden | silver | white | yellow | purple
season: spring | summer | autumn | winter
hour: morning | evening | afternoon
girl: {known_girl} | {known_girl} | {front}{girl_end}
boy: {known_boy} | {known_boy} | {front}{boy_end}
known_girl: Anna | Clara | Elsa | Greta | Hazel | Ida | Lucy | Mira | Nell | Rosa | Ruth | Wren
known_boy: Arlo | Ben | Emil | Finn | Hugo | Jonas | Leo | Max | Otto | Peter | Sam | Tom
front: Ka | Lo | Ta | Ru | Da | Fe | Jo | No | Sa | Vi | Be | Ga | Mi | Za
girl_end: ra | lia | na | wen | mina | della
boy_end: rik | lin | mo | dan | bert | vin
friend: Pip | Bramble | Soot | Button | Pepper | Clover | Biscuit | Thistle | Nutmeg | Acorn
species: fox | goat | crow | donkey | hedgehog | otter | owl | hare | badger | goose
elder: Grandmother Agnes | Captain Brook | Aunt Martha | Master Reed | Widow Dale | Doctor Finch |
  Mayor Stone | Old Jacob | Uncle Silas | Lady Marsh
trait: brave | curious | shy | patient | cheerful | careful | quiet | stubborn
giver: {her} grandmother | {her} grandfather | {her} uncle | {her} godmother | {her} teacher | {her} cousin
""")

(TALE,) = parse("""
tale: {beginning} ¶ {need} ¶ {resolve} ¶ {journey} ¶ {find} ¶ {homeward} {outcome} {closing}
opening: Once upon a time, a {trait} {trade} named {hero} lived in {home_long}.
  | Once upon a time, in {home_long}, there lived a {trait} young {trade} named {hero}.
  | Once upon a time, there was a {trait} {child} named {hero}, the youngest {trade} in {home_long}.
  | Long ago, in {home_long}, there lived a {trait} {trade} named {hero}.
  | Many years ago, a {trait} young {trade} named {hero} lived in {home_long}.
  | In {home_long} lived a {trait} {trade} named {hero}.
  | There was once a {trait} {trade} named {hero}, who lived in {home_long}.
  | This is the story of {hero}, a {trait} {trade} from {home_long}.
habit: Every day {hero} {work}.
  | {She} {work}, and {she} was good at it.
company: {Her} best friend was {a_species} named {friend}.
  | Wherever {hero} went, {a_species} named {friend} went too.
  | {She} shared {her} supper with {a_species} called {friend}.
resolve: "I will go to {place}," said {hero}. ¶ "Then I am coming with you," said {friend}.
  | "Somebody must go to {place}," said {hero}, "and it may as well be us." {friend} was already at the
    door.
  | "It is a long way to {place}," said {friend}. ¶ "Then we should start now," said {hero}.
  | {hero} packed some bread and cheese, called {friend}, and set out for {place}.
introduction: {opening} {habit} {company}
start: {introduction}
homeward: They hurried home.
  | The way home felt short.
  | So they turned around and walked home.
""")
"""The shape of a tale and the sentences that every tale may use."""

(GIFT,) = parse("""
beginning: {start} {gift}
gift: One day {giver} gave {hero} {a_tool}.
  | The greatest treasure of {hero} was {a_tool}, a present from {giver}.
  | In {her} bag {hero} carried {a_tool} that {giver} had given {them}.
  | "Keep it with you," said {giver} one day, and gave {hero} {a_tool}.
journey: {block} {fail} ¶ {hint} {solve}
hint: "What about the {tool}?" asked {friend}.
  | "You still have the {tool}," said {friend}.
  | Then {hero} remembered {giver}, and the {tool}.
  | "Wait," said {friend}. "Why do we carry {a_tool}?"
closing: From that day on, {hero} never left home without thinking of {giver}.
  | And whenever somebody asked how they had done it, {friend} the {species} told them about the {tool}.
  | And so a {trait} {trade}, {a_species} and {a_tool} saved the day.
  | That night {hero} wrote a long letter to {giver} about the {tool} and the road to {place}.
  | That night {friend} asked, "Shall we go again?" ¶ "Tomorrow," said {hero}, and fell asleep.
""")
"""What is special about a tale in which a gift gets the hero past the hurdle."""

(FAVOUR,) = parse("""
beginning: {start}
journey: {trouble} {help} ¶ {block} {fail} ¶ {favour} {solve}
help: {rescue} "Thank you," said the {creature}. "I will not forget it."
  | "Poor thing," said {friend}. {rescue} The {creature} thanked them both and was gone.
  | {rescue} "We have no time for this," said {friend}, but the {creature} looked at {hero} and bowed.
favour: "You helped me, so now I will help you," said a voice. It was the {creature}.
  | Just then they heard a small sound behind them, and there was the {creature}. "My turn," it said.
  | At that moment the {creature} came back. "Let me try," it said.
closing: From that day on, {hero} stopped for everyone who needed help.
  | And every year, when the first snow fell, the {creature} came to visit {hero} and {friend}.
  | And whenever somebody asked how they had done it, {friend} the {species} told them about the {creature}.
  | "Who would have thought that {a_creature} could save us?" said {friend}. {hero} only smiled.
  | And so a {trait} {trade}, {a_species} and {a_creature} saved the day.
""")
"""What is special about a tale in which a creature gets the hero past the hurdle, because it was helped before."""

(BOOK,) = parse("""
title: The Book of {hero} ¶ {introduction}
heading: The {ordinal} tale
tale: {beginning} ¶ {need} ¶ {resolve} ¶ {journey} ¶ {find} ¶ {homeward} {outcome} {reward} {closing}
start: {Season} came to the {home}, and {hero} and {friend} were at home.
  | It was {season} in the {home}. {hero} {work}, and {friend} slept by the stove.
  | It was {season}, and {friend} the {species} was bored. "Nothing ever happens here," said {friend}.
reward: As a reward, {hero} was given a {keepsake}.
  | "This is for you," said {elder}, and gave {hero} a {keepsake}.
  | {elder} put a {keepsake} into the hand of {hero}.
ending: {hero} put the {keepsake} on the shelf, beside the {earlier}.
keepsakes: button | scarf | bead | whistle | cup | ribbon | feather | shell | coin | marble | spoon | box
""")
"""What is special about a tale that is part of a book, and what holds the book together."""

TOOL_HURDLES = parse("""
tool: brass lantern | tin lantern | little lantern
block: Then the path went into a tunnel, and it was so dark that they could not see their own feet.
  | The only way led through a cave as black as ink.
fail: {hero} took three steps, bumped {her} head and had to turn back.
solve: {hero} lit the {tool}, and a circle of warm light spread over the walls. Step by step they walked
    through to the other side.

tool: iron key | rusty key | crooked key
block: Then an iron gate stood across the road, and it was locked.
  | A tall gate closed the road, and nobody was there to open it.
fail: {hero} pushed and pulled, but the gate did not move.
solve: {hero} put the {tool} into the lock. It turned with a click, and the gate swung open.

tool: long rope | strong rope | climbing rope
block: Then they came to a deep gorge, and the bridge had fallen down.
  | The bridge was gone, and far below them roared the river.
fail: They looked for another way, but the gap was too wide everywhere.
solve: {hero} tied the {tool} to a tree, and they swung across, one after the other.

tool: copper bell | hand bell | tiny bell
block: Then a thick fog came down, and all at once {friend} was nowhere to be seen.
  | Fog rose from the ground, and soon {hero} and {friend} could hear but not find each other.
fail: {hero} shouted, but the fog swallowed every word, and {friend} answered from far away.
hint: Then {hero} remembered {giver}, and the {tool}.
  | In {her} bag {her} fingers touched the {tool}.
solve: {hero} rang the {tool} again and again, and {friend} followed the sound until they stood side by
    side.

tool: honey cake | plum cake | raisin loaf
block: Then they met a bear, who sat in the middle of the path and would not move.
  | Around the next corner sat a huge brown bear, as wide as the path.
fail: {hero} clapped {her} hands, but the bear only yawned.
solve: {hero} laid the {tool} on the grass. The bear ate every crumb, licked its nose and let them pass.

tool: woollen blanket | thick blanket | patched blanket
block: Then it began to snow, and {friend} was shivering too much to walk.
  | An icy wind blew, and snow covered the road and the ears of {friend}.
fail: {hero} tried to light a fire, but the wood was wet.
hint: Then {hero} remembered {giver}, and the {tool}.
  | "You still have the {tool}," said {friend}.
solve: They sat close together under the {tool}, warm and dry, until the snow stopped.

tool: old compass | round compass | ivory compass
block: Then five roads met under a dead tree, and every sign had fallen down.
  | The path split into five paths, and they all looked the same.
fail: They chose one, but an hour later they were back at the same spot.
solve: {hero} opened the {tool}. The needle trembled, turned and pointed the right way.

tool: wooden flute | bone flute | reed flute
block: Then they found a giant lying across the road, weeping because he could not sleep.
  | A tired giant blocked the road. "I have not slept for a week," he wept.
fail: {hero} told him a story, but the giant only wept more loudly.
solve: {hero} played a slow song on the {tool}. The giant closed his eyes, rolled aside and began to snore.

tool: pair of shears | pair of garden shears
block: Then a hedge of thorns rose in front of them, taller than a house.
  | Thorns had grown over the road, so thick that not even a mouse could pass.
fail: {hero} tried to push through, and tore {her} sleeve.
solve: With the {tool}, {hero} cut a small door into the thorns, and they crawled through.

tool: paper kite | striped kite | silk kite
block: Then they came to a wide river. The ferry lay on the far side, and the ferryman did not hear them.
  | A river lay before them, and the only ferryman stood on the other bank, looking the wrong way.
fail: {hero} waved both arms, but the ferryman did not turn around.
solve: {hero} let the {tool} fly high above the water. The ferryman saw it, laughed and came to fetch them.

tool: pair of glasses | pair of spectacles
block: Then they reached a small door. "I may only open it for names in my book," said the guard, "but I
    cannot read."
  | A guard sat before a door with a book on his knees. "Your name may be in it," he said, "but my eyes are
    weak."
fail: {hero} said {her} name three times, but the guard shook his head.
solve: {hero} lent him the {tool}. The guard turned the page and smiled. "Here you are, {hero}," he said,
    and opened the door.

tool: black umbrella | big umbrella | old umbrella
block: Then they came to a wide lake, where a boat lay without sail or oars.
  | They had to cross a lake, but the boat on the shore had no sail and no oars.
fail: They paddled with their hands, but the boat only turned in circles.
solve: {hero} opened the {tool}. The wind filled it like a sail and blew them across the lake.
""")
"""What stands in the way, and the tool that gets past it."""

CREATURE_HURDLES = parse("""
creature: mole
trouble: Under a fallen stone they found a mole that could not get out.
rescue: {hero} rolled the stone away.
block: Then a high wall stood across the road, without a door.
fail: {hero} tried to climb it, but the stones were as smooth as glass.
solve: The mole dug a tunnel under the wall, just wide enough for {hero} and {friend}.

creature: swan
trouble: In the reeds they found a swan with its wings caught in a net.
rescue: {hero} cut the net, one string after another.
block: Then they came to a lake so wide that they could not see the other side.
fail: They looked for a boat, but there was not even a plank.
solve: The swan called its sisters, and the white birds carried {hero} and {friend} over the water.

creature: firefly
trouble: In the grass they found a firefly, shut in a jar.
rescue: {hero} opened the lid of the jar.
block: Then the path went into a cave, and it was darker than any night.
fail: {hero} felt along the wall, but soon there was no wall any more.
solve: A thousand fireflies followed it into the cave, until every stone was shining.

creature: mouse
trouble: Beside the road they found a mouse with its tail in a trap.
rescue: {hero} bent the trap open with a stick.
block: Then the ground gave way, and a net pulled {hero} and {friend} high up into a tree.
fail: They kicked and twisted, but the net only closed more tightly.
solve: The mouse gnawed through one string after another, until the net let them gently down.

creature: eagle
trouble: On a rock they found an eagle with a thorn in its foot.
rescue: {hero} pulled out the thorn and washed the foot.
block: Then they lost their way among a thousand trees.
fail: They walked until dark, and came upon their own footprints.
solve: The eagle rose above the trees, circled once and led them straight to the road.

creature: beaver
trouble: By a stream they found a beaver with one paw under a log.
rescue: {hero} and {friend} lifted the log together.
block: Then they came to a wild river without a bridge.
fail: {hero} put one foot into the water, and the river took {her} shoe.
solve: The beaver bit into a tall tree until it fell across the river, and the tree was their bridge.

creature: squirrel
trouble: Under a tree they found a squirrel that was too hungry to climb.
rescue: {hero} gave it all the nuts in {her} bag.
block: Then they came to a locked gate, and the key hung on the highest branch of a tree.
fail: {hero} threw stones at the branch, but the key did not fall.
solve: The squirrel ran up the tree, took the key between its teeth and dropped it at the feet of {hero}.

creature: bee
trouble: In a puddle they found a bee that could not swim.
rescue: {hero} lifted it out on a leaf and let it dry in the sun.
block: Then they stood before three doors. "Only one opens on a garden," a sign said. "Choose once."
fail: {friend} sniffed and {hero} listened, but all three doors were the same.
solve: The bee flew to the door in the middle, where it smelled flowers, and that was the right one.
""")
"""A creature in trouble, what stands in the way afterwards, and how the creature gets past it."""

ERRANDS = parse("""
need: One {season} {hour} {elder} fell ill. "Only the {colour} herb from {place} can help me," said {elder}.
  | One {season} {hour} {elder} woke with a fever, and the only cure was a {colour} herb that grew near
    {place}.
find: Near {place}, between two stones, grew the {colour} herb. {hero} picked one leaf for every day of the
    week.
  | At last they reached {place}, and there was the {colour} herb, still wet with dew.
outcome: {elder} drank a tea of the {colour} herb and was well again the next day.

need: One {season} {hour} {elder} came with a {colour} letter. "Take it to my brother near {place}," said
    {elder}. "We have not spoken for ten years."
  | One {season} {hour} {elder} wrote a {colour} letter to a brother who lived near {place}, and there was
    nobody to carry it.
find: Near {place} an old man opened the {colour} letter, and tears ran down his face. "Tell {elder} that I
    am coming," he said.
  | In a hut near {place} an old man read the {colour} letter twice. Then he went to look for his boots.
outcome: A week later {elder} and the brother sat at one table and laughed about the {colour} letter.

need: One {season} {hour} the smallest lamb of {elder} was missing. It wore a {colour} ribbon, and its
    tracks led toward {place}.
  | One {season} {hour} {elder} called for help. "My lamb with the {colour} ribbon has run away to {place}!"
find: Behind a rock near {place} stood the lamb with the {colour} ribbon, cold but not hurt.
  | Near {place} something was crying. It was the lamb with the {colour} ribbon, and it ran to {hero} at
    once.
outcome: {elder} laughed and cried when the lamb with the {colour} ribbon ran through the gate.

need: One {season} {hour}, just before the great feast, {elder} found that there were no {colour} candles
    left. They were made only near {place}.
  | The great feast was near. "We need {colour} candles," said {elder}, "and they are made only near
    {place}."
find: The candle makers of {place} filled a whole basket with {colour} candles.
  | Near {place} lived three sisters who made candles. They gave {hero} all the {colour} candles they had.
outcome: That night {colour} candles burned in every window, and {elder} danced until midnight.

need: One {season} {hour} the well ran dry. {elder} knew an old song about a {colour} stone near {place}
    that held back the water.
  | One {season} {hour} there was no water in the well. "A {colour} stone near {place} must have moved,"
    said {elder}.
find: Near {place} they found the {colour} stone and rolled it aside, and clear water ran down the hill.
  | At last they reached {place}. Together they pushed the {colour} stone away, and a spring bubbled out of
    the ground.
outcome: The well was full again, and {elder} gave everyone a cup of cold water.

need: One {season} {hour} the clock on the square stood still. {elder} said that it needed a {colour} wheel
    from the clockmaker near {place}.
  | One {season} {hour} nobody knew what time it was. "The clock needs a new {colour} wheel," said {elder},
    "and the clockmaker lives near {place}."
find: The clockmaker of {place} looked into every drawer, and in the last one lay a {colour} wheel.
  | Near {place} a thousand clocks were ticking. The clockmaker took a {colour} wheel out of the oldest one.
outcome: With the {colour} wheel inside, the clock struck twelve, and {elder} counted every stroke.

need: One {season} {hour} hail destroyed every garden. {elder} had heard of {colour} beans near {place} that
    grow in any weather.
  | One {season} {hour} hail broke every plant. "We need the {colour} beans from {place}," said {elder}.
find: Near {place} an old gardener gave them a sack of {colour} beans and asked for nothing but a song.
  | At last they reached {place}, where the {colour} beans climbed up to the clouds. {hero} filled {her}
    pockets.
outcome: The {colour} beans grew overnight, and {elder} cooked soup for everyone.

need: The birthday of {elder} was near, and {elder} had always wished for a {colour} rose from {place}.
  | One {season} {hour} {elder} sighed. "If only I could smell a {colour} rose from {place} once more."
find: At last they reached {place}, and among the weeds grew a single {colour} rose.
  | Near {place} the air was sweet. {hero} dug up a {colour} rose with all its roots.
outcome: {elder} planted the {colour} rose beside the door, where everyone could smell it.

need: One {season} {hour} a magpie stole the {colour} ring of {elder} and flew off toward {place}.
  | One {season} {hour} {elder} came running. "A magpie took my {colour} ring! It flew toward {place}!"
find: High in a tree near {place} was the nest of the magpie, and in it lay the {colour} ring.
  | Near {place} the magpie was admiring itself in a puddle. It traded the {colour} ring for a bit of
    cheese.
outcome: {elder} put on the {colour} ring and promised to close the window.

need: One {season} {hour} {hero} found an old map with a {colour} cross near {place}. "I have always
    wondered what is there," said {elder}.
  | One {season} {hour} {elder} unrolled an old map. "Look at this {colour} cross near {place}," said
    {elder}. "I am too old to go and see."
find: At last they reached {place}. Under a {colour} stone they found a chest, and in the chest a book of
    old songs.
  | Near {place} they dug below a {colour} stone, and found a chest with a book of old songs.
outcome: {elder} knew every one of the old songs, and they sang until the stars came out.

need: One {season} {hour} {hero} found a {colour} egg. "It belongs to the great bird of {place}," said
    {elder}. "Bring it home before it hatches."
  | One {season} {hour} a {colour} egg lay on the doorstep of {elder}, and everyone knew that it belonged to
    the great bird of {place}.
find: The great bird of {place} bent down and touched the {colour} egg. "I thought it was lost," it said.
  | They reached {place} just in time. The {colour} egg cracked, and the great bird spread its wings for
    joy.
outcome: The great bird flew three times around the {home}, and {elder} waved to it.

need: One {season} {hour} the youngest child of {elder} followed a {colour} butterfly and did not come back.
    The last footprints led toward {place}.
  | One {season} {hour} {elder} was pale with fear. "My youngest child ran after a {colour} butterfly, all
    the way to {place}!"
find: Near {place} sat the child, still watching the {colour} butterfly. "Is it time for supper?" asked the
    child.
  | At last they reached {place}, and there lay the child, asleep, with the {colour} butterfly on one
    finger.
outcome: {elder} held the child for a long time, and nobody was angry about the {colour} butterfly.
""")
"""Why the hero must go to a place, what happens there, and what it changes at home."""

GENDERS = parse("""
hero: {girl}
child: girl
she: she
her: her
them: her

hero: {boy}
child: boy
she: he
her: his
them: him
""")

HOMES = parse("""
home: village
home_long: a small village by the sea | a village at the foot of a mountain

home: town
home_long: a quiet town beside a river | a harbour town in the north

home: valley
home_long: a valley full of apple trees | a long valley behind the hills

home: hamlet
home_long: a hamlet on the edge of a forest

home: harbour
home_long: a small harbour on a rocky island
""")
"""What a home is called, and how it is introduced."""

TRADES = parse("""
trade: baker
work: baked brown bread before the sun came up

trade: weaver
work: wove blankets out of soft wool

trade: shepherd
work: led the sheep up to the high fields

trade: gardener
work: watered beans, roses and pumpkins

trade: carpenter
work: made tables that never wobbled

trade: potter
work: shaped bowls out of river clay

trade: beekeeper
work: sang to the bees in the garden

trade: tailor
work: sewed coats with many pockets

trade: fisher
work: mended nets and rowed out with the tide

trade: cobbler
work: put new soles on old boots
""")

ORDINALS = ("first", "second", "third", "fourth", "fifth")


def expand(text: str, rules: Rules, rng: random.Random) -> str:
    """Replace every ``{symbol}`` in ``text`` by one of its alternatives, expanded in turn."""

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
    rules = {**WORLD, **TALE, **rng.choice(GENDERS), **rng.choice(HOMES), **rng.choice(TRADES)}
    return settle(rules, rng, "hero", "trait", "friend", "species")


def tell(rules: Rules, rng: random.Random) -> str:
    """Tell one tale of a settled cast."""
    plot, hurdles, helper = rng.choice(((GIFT, TOOL_HURDLES, "tool"), (FAVOUR, CREATURE_HURDLES, "creature")))
    rules = {**rules, **plot, **rng.choice(hurdles), **rng.choice(ERRANDS)}
    return expand("{tale}", settle(rules, rng, "season", "place", "elder", "giver", "colour", helper), rng)


def story(rng: random.Random) -> str:
    """Tell one tale."""
    return tell(cast(rng), rng)


def book(rng: random.Random, tales: int) -> str:
    """Tell 2 to ``MAX_TALES`` tales about one cast; the end recalls the keepsakes of all of them."""
    rules = {**cast(rng), **BOOK}
    keepsakes = [f"{rng.choice(rules['colour'])} {thing}" for thing in rng.sample(BOOK["keepsakes"], tales)]
    parts = [expand("{title}", rules, rng)]
    for ordinal, keepsake in zip((*ORDINALS[: tales - 1], "last"), keepsakes, strict=True):
        rules |= {"ordinal": (ordinal,), "keepsake": (keepsake,)}
        parts += [expand("{heading}", rules, rng), tell(rules, rng)]
    parts.append(expand("{ending}", rules | {"earlier": (series(keepsakes[:-1]),)}, rng))
    return "\n\n".join(parts)


def series(nouns: Sequence[str]) -> str:
    """Return ``nouns`` as they read behind one "the": "cup", "cup and the box", "cup, the box and the spoon"."""
    *front, last = nouns
    return f"{', the '.join(front)} and the {last}" if front else last


def documents(seed: int, *, books: float) -> Iterator[str]:
    """Yield documents without end, the same ones for the same seed: books with probability ``books``, else one tale."""
    rng = random.Random(seed)  # noqa: S311 - stories, not secrets
    while True:
        yield book(rng, rng.randint(2, MAX_TALES)) if rng.random() < books else story(rng)
