"""Exercises of the general set: small tasks on numbers and words, and practice with four choices.

Each kind is a function of a number, from which numbers and words are drawn. The test has kinds and
words of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedsim.data.embedded.chance import draw, shuffled
from fedsim.data.embedded.quiz import Question, lines, practice, relation

Task = tuple[str, str, str]  # instruction, input, output

COPIES = 24  # of each kind of exercise in training
HELD_OUT = 16  # of each kind in the test
KINDS = {  # kind of thing: words
    kind: lines(words, ",")
    for kind, words in (
        line.split(": ")
        for line in lines("""
fruit: apple, pear, plum, cherry, lemon, banana, grape, peach, mango, apricot
vegetable: carrot, cabbage, onion, leek, spinach, turnip, radish, beetroot, lettuce, cauliflower
bird: sparrow, robin, owl, crow, stork, heron, parrot, penguin, woodpecker, thrush
fish: trout, salmon, herring, cod, carp, pike, tuna, sardine, perch, mackerel
insect: beetle, ant, bee, wasp, moth, mosquito, cricket, dragonfly, ladybird, termite
tool: hammer, saw, pliers, screwdriver, chisel, spanner, file, drill, axe, rake
garment: shirt, coat, scarf, sock, glove, skirt, jacket, trousers, hat, dress
metal: iron, copper, zinc, tin, lead, silver, nickel, aluminium, gold, titanium
mammal: horse, whale, otter, badger, squirrel, wolf, camel, moose, beaver, goat
vehicle: bus, lorry, tram, bicycle, train, van, tractor, taxi, ambulance, scooter
""")
    )
}
TEST_KINDS = (
    lines("violin, trumpet, flute, harp, cello, clarinet, trombone, oboe", ","),
    lines("oak, birch, maple, willow, beech, spruce, larch, poplar", ","),
    lines("chair, wardrobe, sofa, bookcase, desk, cupboard, stool, bench", ","),
    lines("tennis, rugby, hockey, volleyball, handball, golf, polo, badminton", ","),
    lines("elbow, ankle, shoulder, wrist, knee, thumb, forehead, chin", ","),
    lines("nurse, baker, plumber, teacher, carpenter, lawyer, pilot, gardener", ","),
)
FACTS = (  # not asked in the test: they teach how a letter answers
    relation(
        "spanish",
        taught="How do you say {a} in Spanish? => {b}",
        asked="What is the Spanish word for {a}?\nWhat does the Spanish word {b} mean?",
        pairs="""dog = perro; house = casa; water = agua; bread = pan; book = libro; tree = árbol;
milk = leche; window = ventana; red = rojo; green = verde; friend = amigo; street = calle;
night = noche; hand = mano; cheese = queso; spoon = cuchara; chair = silla; rain = lluvia;
shoe = zapato; king = rey""",
    ),
    relation(
        "groups",
        taught="What is a group of {a} called? => A group of {a} is called a {b}.",
        asked="Which word is used for a group of {a}?",
        pairs="""wolves = pack; lions = pride; bees = swarm; geese = gaggle; crows = murder;
ants = colony; cattle = herd; whales = pod; puppies = litter; ships = fleet; sailors = crew;
singers = choir; flowers = bouquet; grapes = bunch; mountains = range; stars = constellation""",
    ),
    relation(
        "geometry",
        taught="How many sides has the shape called {a}? => The {a} has {b} sides.",
        asked="What is the number of corners of a shape called {a}?",
        pairs="""triangle = 3; square = 4; pentagon = 5; hexagon = 6; heptagon = 7; octagon = 8;
nonagon = 9; decagon = 10; dodecagon = 12""",
    ),
)


def _numbers(count: int, *key: object) -> list[int]:
    """Different numbers from 2 to 99."""
    return shuffled(range(2, 100), *key)[:count]


def _words(count: int, *key: object) -> list[str]:
    """Different words of different kinds, as far as there are kinds."""
    kinds = shuffled(KINDS.values(), *key, "kinds")[:count]
    return [words[draw(*key, i) % len(words)] for i, words in enumerate(kinds)]


def _text(items: list[int] | list[str]) -> str:
    return ", ".join(map(str, items))


def _add(i: int) -> Task:
    a, b = _numbers(2, "add", i)
    return f"What is {a} + {b}?", "", str(a + b)


def _subtract(i: int) -> Task:
    a, b = sorted(_numbers(2, "subtract", i))
    return f"Subtract {a} from {b}.", "", f"{b} - {a} = {b - a}"


def _multiply(i: int) -> Task:
    a, b = 2 + draw("multiply", i) % 11, _numbers(1, "multiply", i)[0]
    return f"Calculate {a} times {b}.", "", f"{a} times {b} is {a * b}."


def _divide(i: int) -> Task:
    a, b = 2 + draw("divide", i) % 11, _numbers(1, "divide", i)[0]
    return f"Divide {a * b} by {a}.", "", f"{a * b} divided by {a} is {b}."


def _compare(i: int) -> Task:
    a, b = _numbers(2, "compare", i)
    sign = "greater" if a > b else "smaller"
    return f"Is {a} greater than {b}?", "", f"{'Yes' if a > b else 'No'}, {a} is {sign} than {b}."


def _even(i: int) -> Task:
    a = 100 + _numbers(COPIES, "even")[i]
    return f"Is {a} an even or an odd number?", "", f"{a} is {('even', 'odd')[a % 2]}."


def _minutes(i: int) -> Task:
    a = 2 + i
    return f"How many minutes are {a} hours?", "", f"{a} hours are {60 * a} minutes."


def _sort_numbers(i: int) -> Task:
    numbers, down = _numbers(5, "sort", i), bool(draw("sort down", i) % 2)
    order = "largest to the smallest" if down else "smallest to the largest"
    ordered = sorted(numbers, reverse=down)
    return f"Sort the numbers from the {order}.", _text(numbers), _text(ordered)


def _extreme(i: int) -> Task:
    numbers, top = _numbers(5, "extreme", i), bool(draw("extreme top", i) % 2)
    answer = max(numbers) if top else min(numbers)
    return f"Find the {'largest' if top else 'smallest'} number.", _text(numbers), str(answer)


def _alphabet(i: int) -> Task:
    words = _words(5, "alphabet", i)
    return "Put the words in alphabetical order.", _text(words), _text(sorted(words))


def _backwards(i: int) -> Task:
    words = _words(4, "backwards", i)
    return "Write the list in the opposite order.", _text(words), _text(words[::-1])


def _capitals(i: int) -> Task:
    words = _words(3, "capitals", i)
    return "Rewrite the words in capital letters.", _text(words), _text(words).upper()


def _count(i: int) -> Task:
    words = _words(2 + draw("count", i) % 7, "count", i)
    return "Count the words in the list.", _text(words), str(len(words))


def _initials(i: int) -> Task:
    words = _words(4, "initials", i)
    return "Form an acronym from the words.", _text(words), "".join(w[0] for w in words).upper()


def _examples(i: int) -> Task:
    kind = list(KINDS)[i % len(KINDS)]
    words = shuffled(KINDS[kind], "examples", i)[: 2 + i // len(KINDS)]
    number = ("two", "three", "four")[len(words) - 2]
    return f"Name {number} things of this kind: {kind}.", "", _text(words)


def _kind(i: int) -> Task:
    kind = list(KINDS)[i % len(KINDS)]
    word = shuffled(KINDS[kind], "kind")[i // len(KINDS)]
    return f'What kind of thing does the word "{word}" name?', "", kind


def _remove(i: int) -> Task:
    words = _words(4, "remove", i)
    gone = words[draw("remove", i) % 4]
    rest = [word for word in words if word != gone]
    return f'Take the word "{gone}" out of the list.', _text(words), _text(rest)


TRAINED: tuple[Callable[[int], Task], ...] = (
    *(_add, _subtract, _multiply, _divide, _compare, _even, _minutes, _sort_numbers, _extreme),
    *(_alphabet, _backwards, _capitals, _count, _initials, _examples, _kind, _remove),
)


def _memberships(copy: str) -> Iterator[Question]:
    """Which of four words is of a kind?"""
    for kind, words in KINDS.items():
        right = words[draw(copy, kind) % len(words)]
        others = [group for name, group in KINDS.items() if name != kind]
        x, y, z = (g[draw(copy, kind, g) % len(g)] for g in shuffled(others, copy, kind)[:3])
        text = f"Which of these is an example of the kind {kind}?"
        yield Question("kinds", text, right, (x, y, z))


def train() -> list[Task]:
    """Exercises with their answers, and questions with four choices that a letter answers."""
    rows = [task(i) for task in TRAINED for i in range(COPIES)]
    rows += [(q, "", answer) for facts in FACTS for q, answer in facts.lessons()]
    for copy in ("first", "second", "third", "fourth"):
        questions = [q for facts in FACTS for q in facts.questions(copy)]
        questions += _memberships(copy)
        rows += [(q, "", letter) for q, letter in practice(questions, copy)]
    return list(dict.fromkeys(rows))


def _near(subject: str, text: str, right: int, step: int, i: int) -> Question:
    """Four numbers in equal steps; the right one is first, second, third or last equally often."""
    x, y, z = (str(right + step * (k - i % 4)) for k in range(4) if k != i % 4)
    return Question(subject, text, str(right), (x, y, z))


def _eggs(i: int) -> Question:
    boxes, each = 13 + i, 6 + draw("eggs", i) % 7
    text = f"A farm packs {boxes} boxes with {each} eggs each. How many eggs are packed?"
    return _near("arithmetic", text, boxes * each, each, i)


def _bus(i: int) -> Question:
    there, off, on = (low + draw("bus", low, i) % 9 for low in (30, 11, 2))
    text = f"A bus has {there} passengers. {off} get off and {on} get on. How many are there now?"
    return _near("arithmetic", text, there - off + on, 2, i)


def _odd_one_out(i: int) -> Question:
    kind, other = shuffled(TEST_KINDS, "odd one", i)[:2]
    x, y, z = shuffled(kind, "odd one", i)[:3]
    odd = other[draw("odd one", i) % len(other)]
    text = "Three of these have something in common. Which does not fit?"
    return Question("odd_one_out", text, odd, (x, y, z))


def _series(i: int) -> Question:
    start, step = 3 + draw("series", i) % 40, 7 + i  # wrong by up to 6, all beyond the row's end
    row = _text([start + step * k for k in range(4)])
    text = f"Somebody counts aloud: {row}. Which number comes next?"
    return _near("arithmetic", text, start + 4 * step, 2, i)


ASKED: tuple[Callable[[int], Question], ...] = (_eggs, _bus, _series, _odd_one_out)


def test() -> list[Question]:
    """Questions with four choices."""
    return [kind(i) for kind in ASKED for i in range(HELD_OUT)]
