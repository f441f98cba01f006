"""Draws arithmetic word problems with their solution: a start value, then one to three operations with reasons.

Random choices use `Random.random()` alone (through `Dice`), the one method whose sequence Python promises to keep
between versions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import TypeVar

T = TypeVar("T")

PREAMBLE = "Tool available:\n[1] Python interpreter\nSolve the following math problem step-by-step.\n"
NAMES = ("Tom", "Mia", "Ben", "Anna", "Omar", "Lena", "Raj", "Sofia", "Leo", "Nina", "Max", "Eva")
THINGS = ("apples", "pens", "books", "coins", "shells", "cards", "stamps", "marbles", "balls", "cookies")
BOXES = (("boxes", "box"), ("bags", "bag"), ("jars", "jar"), ("baskets", "basket"))
AMOUNTS = ("liters of juice", "kilos of rice", "meters of rope", "liters of milk", "kilos of flour")
# (clause of the problem, symbol); {n} is the number, {f} a friend
CHANGES = (
    ("buys {n} more", "+"),
    ("finds {n} more", "+"),
    ("gets {n} from {f}", "+"),
    ("wins {n} more", "+"),
    ("gives {n} to {f}", "-"),
    ("loses {n}", "-"),
    ("sells {n}", "-"),
    ("gives away {n}", "-"),
)
# (what is converted, into what, how many of these)
UNITS = (("hours", "minutes", 60), ("dozen eggs", "eggs", 12), ("weeks", "days", 7), ("feet", "inches", 12))


class Dice:
    """Makes reproducible choices from a text seed."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed)

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self._random.random() < probability

    def number(self, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """Return one of `items`, each with the same probability."""
        return items[self.number(0, len(items) - 1)]

    def weighted(self, items: Sequence[tuple[T, float]]) -> T:
        """Return one of `items`, each given with its weight."""
        left = self._random.random() * sum(weight for _, weight in items)
        for item, weight in items:
            left -= weight
            if left < 0:
                return item
        return items[-1][0]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Return `items` in a random order."""
        rest = list(items)
        return [rest.pop(self.number(0, len(rest) - 1)) for _ in items]


@dataclass(frozen=True, slots=True)
class Operation:
    """Holds one step of a solution.

    Attributes:
        symbol: + - * / of the value so far and `number`; "from" subtracts the value from `number`.
        number: the second operand.
        reason: the clause of the problem that asks for it.
        is_conversion: whether it converts units.
    """

    symbol: str
    number: int
    reason: str
    is_conversion: bool = False

    def apply(self, value: Fraction) -> Fraction:
        """Return what the value so far becomes."""
        match self.symbol:
            case "+":
                return value + self.number
            case "-":
                return value - self.number
            case "*":
                return value * self.number
            case "/":
                return value / self.number
            case _:
                return self.number - value


@dataclass(frozen=True, slots=True)
class Problem:
    """Holds a word problem and its solution.

    Attributes:
        text: as asked.
        start: the value that the solution starts with.
        opening: says where the start value comes from.
        operations: the steps of the solution.
    """

    text: str
    start: int
    opening: str
    operations: tuple[Operation, ...]

    @property
    def instruction(self) -> str:
        """Return the text with its preamble, which is the prompt of a tree."""
        return PREAMBLE + self.text

    @property
    def answer(self) -> Fraction:
        """Return the exact answer."""
        value = Fraction(self.start)
        for operation in self.operations:
            value = operation.apply(value)
        return value

    def is_sensible(self) -> bool:
        """Tell whether every value on the way is positive and the answer has at most two decimals."""
        value = Fraction(self.start)
        for operation in self.operations:
            value = operation.apply(value)
            if value <= 0:
                return False
        return 100 % value.denominator == 0


def draw(dice: Dice) -> Problem:
    """Draw a sensible problem of a random family."""
    while True:
        problem = dice.weighted(FAMILIES)(dice)
        if problem.is_sensible():
            return problem


def _changes(dice: Dice, name: str, friend: str, count: int) -> list[Operation]:
    """Draw `count` clauses in which the number of things of `name` changes."""
    clauses = dice.shuffled(CHANGES)[:count]
    numbers = [dice.number(2, 30) for _ in clauses]
    return [
        Operation(symbol, n, f"{name} {clause.format(n=n, f=friend)}")
        for (clause, symbol), n in zip(clauses, numbers, strict=True)
    ]


def _told(operations: Sequence[Operation]) -> str:
    return "".join(f" {operation.reason}." for operation in operations)


def _two_names(dice: Dice) -> tuple[str, str]:
    first, second = dice.shuffled(NAMES)[:2]
    return first, second


def possessions(dice: Dice) -> Problem:
    """Draw a problem of some things, then one to three changes of their number."""
    name, friend = _two_names(dice)
    start, thing = dice.number(12, 95), dice.pick(THINGS)
    changes = _changes(dice, name, friend, dice.number(1, 3))
    opening = f"{name} has {start} {thing}"
    text = f"{opening}.{_told(changes)} How many {thing} does {name} have now?"
    return Problem(text, start, opening, tuple(changes))


def boxes(dice: Dice) -> Problem:
    """Draw a problem of boxes that hold equally many things, then up to one change."""
    name, friend = _two_names(dice)
    start, each = dice.number(3, 20), dice.number(3, 25)
    thing, (many, one) = dice.pick(THINGS), dice.pick(BOXES)
    opening = f"{name} has {start} {many}"
    fill = Operation("*", each, f"each {one} holds {each} {thing}")
    changes = _changes(dice, name, friend, dice.number(0, 1))
    text = f"{opening} and {fill.reason}.{_told(changes)} How many {thing} does {name} have?"
    return Problem(text, start, opening, (fill, *changes))


def share(dice: Dice) -> Problem:
    """Draw a problem of an amount, up to one change of it, then sharing it equally."""
    name, friend = _two_names(dice)
    start, amount = dice.number(12, 60), dice.pick(AMOUNTS)
    parts = dice.pick((2, 4, 5, 10))
    changes = _changes(dice, name, friend, dice.number(0, 1))
    opening = f"{name} has {start} {amount}"
    split = Operation("/", parts, f"{parts} people share it equally")
    text = f"{opening}.{_told(changes)} Then {split.reason}. How much does each get?"
    return Problem(text, start, opening, (*changes, split))


def shop(dice: Dice) -> Problem:
    """Draw a problem of the change after buying several things at one price."""
    name = dice.pick(NAMES)
    price, count, thing = dice.number(2, 15), dice.number(2, 9), dice.pick(THINGS)
    paid = dice.pick((20, 50, 80, 100, 150, 200))
    opening = f"Each of the {thing} costs {price} dollars"
    buy = Operation("*", count, f"{name} buys {count}")
    pay = Operation("from", paid, f"{name} pays with {paid} dollars")
    text = f"{opening}. {buy.reason} and pays with {paid} dollars. How much change does {name} get?"
    return Problem(text, price, opening, (buy, pay))


def travel(dice: Dice) -> Problem:
    """Draw a problem of travelling at a speed for some hours, then some km more."""
    name = dice.pick(NAMES)
    verb, fastest = dice.pick((("drives", 90), ("rides", 25), ("sails", 20), ("walks", 6)))
    speed, hours, rest = dice.number(3, fastest), dice.number(2, 9), dice.number(2, 30)
    opening = f"{name} {verb} {speed} km per hour"
    drive = Operation("*", hours, f"{name} {verb} for {hours} hours")
    more = Operation("+", rest, f"{name} {verb} {rest} km more")
    text = f"{opening} for {hours} hours, then {rest} km more. How many km does {name} go?"
    return Problem(text, speed, opening, (drive, more))


def units(dice: Dice) -> Problem:
    """Draw a problem of a conversion of units, then adding or taking away some."""
    name = dice.pick(NAMES)
    large, small, factor = dice.pick(UNITS)
    start, rest = dice.number(2, 12), dice.number(2, 30)
    verb, symbol = dice.pick((("adds", "+"), ("takes away", "-")))
    opening = f"{name} starts with {start} {large}"
    convert = Operation("*", factor, f"we count in {small}", is_conversion=True)
    change = Operation(symbol, rest, f"{name} {verb} {rest} {small}")
    text = f"{opening} and {verb} {rest} {small}. How many {small} is that?"
    return Problem(text, start, opening, (convert, change))


def mean(dice: Dice) -> Problem:
    """Draw a problem of the average of two or three numbers."""
    name, game = dice.pick(NAMES), dice.pick(("points", "goals", "marks"))
    scores = [dice.number(4, 60) for _ in range(dice.number(2, 3))]
    opening = f"{name} gets {scores[0]} {game}"
    adds = [Operation("+", score, f"{name} also gets {score}") for score in scores[1:]]
    split = Operation("/", len(scores), f"there are {len(scores)} games")
    listed = ", ".join(map(str, scores[:-1])) + f" and {scores[-1]}"
    text = f"{name} gets {listed} {game} in {len(scores)} games. What is the average?"
    return Problem(text, scores[0], opening, (*adds, split))


def together(dice: Dice) -> Problem:
    """Draw a problem of two people, one compared with the other, and their sum."""
    name, friend = _two_names(dice)
    start, thing = dice.number(6, 50), dice.pick(THINGS)
    symbol, phrase = dice.pick((("*", "{n} times as many"), ("+", "{n} more"), ("-", "{n} fewer")))
    n = dice.number(2, 6) if symbol == "*" else dice.number(2, 20)
    opening = f"{name} has {start} {thing}"
    compare = Operation(symbol, n, f"{friend} has {phrase.format(n=n)}")
    total = Operation("+", start, f"{name} has {start} too")
    text = f"{opening}. {compare.reason}. How many {thing} do they have together?"
    return Problem(text, start, opening, (compare, total))


def half(dice: Dice) -> Problem:
    """Draw a problem in which half is given away, then up to one change."""
    name, friend = _two_names(dice)
    start, amount = dice.number(10, 90), dice.pick(AMOUNTS)
    opening = f"{name} has {start} {amount}"
    give = Operation("/", 2, f"{name} keeps half of it")
    changes = _changes(dice, name, friend, dice.number(0, 1))
    text = f"{opening}. {give.reason}.{_told(changes)} How much does {name} have now?"
    return Problem(text, start, opening, (give, *changes))


def wages(dice: Dice) -> Problem:
    """Draw a problem of earning some dollars a day for several days, then spending some."""
    name, what = dice.pick(NAMES), dice.pick(("a bike", "a coat", "a lamp", "a game"))
    pay, days, spent = dice.number(5, 40), dice.number(3, 12), dice.number(10, 60)
    opening = f"{name} earns {pay} dollars a day"
    work = Operation("*", days, f"{name} works {days} days")
    spend = Operation("-", spent, f"{name} spends {spent} on {what}")
    text = f"{opening}. {work.reason} and spends {spent} on {what}. How many dollars are left?"
    return Problem(text, pay, opening, (work, spend))


FAMILIES: tuple[tuple[Callable[[Dice], Problem], float], ...] = (
    (possessions, 3.0),
    (boxes, 1.5),
    (share, 1.5),
    (shop, 1.0),
    (travel, 1.0),
    (units, 1.5),
    (mean, 1.0),
    (together, 1.0),
    (half, 1.0),
    (wages, 1.0),
)
