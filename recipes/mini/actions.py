"""Writes actions, step-by-step text with Python code that solves a problem, and the mistakes that spoil one.

A `Draft` is an action before it is text. What its steps *say* and what its code *does* may differ, which is one family
of mistakes; the other (`Draft.slip`) is made when the code is written down. Every mistake comes with the critique of
it.
"""

import re
from dataclasses import dataclass, replace

from silva.recipes.mini.problems import Dice, Operation, Problem

ORDERS = {
    "+": "add {n}",
    "-": "subtract {n}",
    "*": "multiply by {n}",
    "/": "divide by {n}",
    "from": "subtract from {n}",
}
NOUNS = {"+": "an addition", "-": "a subtraction", "*": "a multiplication", "/": "a division"}
CONFUSED = {"+": "-*", "-": "+", "*": "+-", "/": "*-", "from": "+"}
# (shape of the code, weight of drawing it)
SHAPES = (
    # one variable, a line per operation: total = total + 5
    ("update", 1.0),
    # the same with total += 5
    ("inplace", 0.8),
    # a new variable per operation
    ("chain", 0.8),
    # one expression, then printed
    ("expression", 1.4),
    # the expression inside print
    ("direct", 1.0),
    # def solve(): ...
    ("function", 0.8),
)
VOICES = (("short", 0.7), ("line", 1.0), ("each", 0.8))
VARIABLES = ("total", "result", "answer", "count", "value")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
COMMENTS = ("Compute the answer.", "Calculate and print it.", "Write it in Python.", "Let Python do it.")

# (mistake, weight of drawing it). Half of the mistakes show in the code itself, half only by comparing it with the
# problem: a reward model of a million parameters learns the first kind in a minute and the second slowly, so that a
# demo has something to show.
MISTAKES = (
    ("operator", 2.0),
    ("name", 1.4),
    ("silent", 2.0),
    ("syntax", 2.0),
    ("quoted", 2.0),
    # only where the answer is not a whole number
    ("floor", 3.0),
    # only where parentheses matter
    ("parentheses", 3.0),
    # only where units are converted
    ("unit", 3.0),
    ("forgotten", 1.0),
    ("order", 0.8),
    ("twice", 0.6),
    ("copied", 0.6),
)


@dataclass(frozen=True, slots=True)
class Draft:
    """Holds an action before it is text.

    Attributes:
        opening: says where the start value comes from.
        said_start: the start value that the steps say.
        said: the operations that the steps say.
        start: the start value in the code.
        done: the operations in the code.
        shape: of the code, one of `SHAPES`.
        voice: of the steps, one of `VOICES`.
        variable: the name that the code gives the result.
        comment: in the first line of the code.
        slip: a mistake of the code alone, and its variant after a colon; "" for none.
    """

    opening: str
    said_start: int
    said: tuple[Operation, ...]
    start: int
    done: tuple[Operation, ...]
    shape: str
    voice: str
    variable: str
    comment: str
    slip: str = ""

    def text(self) -> str:
        """Return the action: the steps, then the code in a ```python fence."""
        thoughts = _thoughts(self)
        code = "\n".join(_code(self))
        return "\n".join([*thoughts, "```python", f"# Step {len(thoughts) + 1}: {self.comment}", code, "```"])


def correct(problem: Problem, dice: Dice, like: Draft | None = None) -> Draft:
    """Return a draft that does what the problem asks, in the style of `like` or in a random one."""
    if like is not None:
        shape, voice, variable, comment = like.shape, like.voice, like.variable, like.comment
    else:
        shape, voice = dice.weighted(SHAPES), dice.weighted(VOICES)
        variable, comment = dice.pick(VARIABLES), dice.pick(COMMENTS)
    operations = problem.operations
    start = problem.start
    return Draft(problem.opening, start, operations, start, operations, shape, voice, variable, comment)


def spoil(draft: Draft, mistake: str, problem: Problem, dice: Dice) -> tuple[Draft, str] | None:
    """Put a mistake into a draft.

    Only the interpreter can tell whether the result is wrong: some mistakes leave the answer as it was.

    Args:
        draft: a correct one.
        mistake: one of `MISTAKES`.
        problem: that the draft solves.
        dice: chooses the variant.

    Returns:
        The draft with the mistake, and the critique of it; None where the mistake does not apply.
    """
    match mistake:
        case "operator":
            return _wrong_operator(draft, dice)
        case "copied":
            return _wrong_number(draft, dice)
        case "unit":
            return _wrong_unit(draft, dice)
        case "forgotten":
            return _forgotten(draft, dice)
        case "twice":
            return _twice(draft, dice)
        case "order":
            return _wrong_order(draft, dice)
        case _:
            return _slip(draft, mistake, problem, dice)


# ---- mistakes in what is calculated ----


def _at(operations: tuple[Operation, ...], index: int, new: Operation) -> tuple[Operation, ...]:
    return (*operations[:index], new, *operations[index + 1 :])


def _wrong_operator(draft: Draft, dice: Dice) -> tuple[Draft, str]:
    index = dice.number(0, len(draft.done) - 1)
    right = draft.done[index]
    wrong = replace(right, symbol=dice.pick(CONFUSED[right.symbol]))
    said = _at(draft.said, index, wrong) if dice.chance(0.75) else draft.said
    order = ORDERS[right.symbol].format(n=right.number)
    critique = dice.pick(
        (
            f"The operator is wrong: {right.reason}, so you must {order}.",
            f"Check the operator: {NOUNS[wrong.symbol]} does not fit, because {right.reason}.",
        )
    )
    return replace(draft, said=said, done=_at(draft.done, index, wrong)), critique


def _wrong_number(draft: Draft, dice: Dice) -> tuple[Draft, str]:
    # -1 is the start value
    index = dice.number(-1, len(draft.done) - 1)
    right = draft.start if index < 0 else draft.done[index].number
    wrong = dice.pick([n for n in (right + 1, right - 1, right + 10, right - 10, right * 10) if n > 1])
    is_said = dice.chance(0.5)
    critique = f"A number is copied wrongly: it must be {right}, not {wrong}."

    def retold(text: str) -> str:
        return re.sub(rf"\b{right}\b", str(wrong), text)

    if index < 0:
        spoiled = replace(draft, start=wrong)
        if is_said:
            spoiled = replace(spoiled, said_start=wrong, opening=retold(draft.opening))
        return spoiled, critique
    operation = draft.done[index]
    done = _at(draft.done, index, replace(operation, number=wrong))
    if not is_said:
        return replace(draft, done=done), critique
    said = replace(operation, number=wrong, reason=retold(operation.reason))
    return replace(draft, done=done, said=_at(draft.said, index, said)), critique


def _wrong_unit(draft: Draft, dice: Dice) -> tuple[Draft, str] | None:
    for index, right in enumerate(draft.done):
        if right.is_conversion:
            number = {60: dice.pick((100, 24)), 12: 10, 7: dice.pick((5, 10))}[right.number]
            wrong = replace(right, number=number)
            said = _at(draft.said, index, wrong) if dice.chance(0.7) else draft.said
            critique = f"The conversion is wrong: {right.reason}, so the factor is {right.number}."
            return replace(draft, said=said, done=_at(draft.done, index, wrong)), critique
    return None


def _forgotten(draft: Draft, dice: Dice) -> tuple[Draft, str] | None:
    if len(draft.done) < 2:
        return None
    last = draft.done[-1]
    said = draft.said[:-1] if dice.chance(0.4) else draft.said
    critique = dice.pick(
        (f"The last operation is missing: {last.reason}.", f"You stopped too early: {last.reason}.")
    )
    return replace(draft, said=said, done=draft.done[:-1]), critique


def _twice(draft: Draft, dice: Dice) -> tuple[Draft, str]:
    index = dice.number(0, len(draft.done) - 1)
    done = (*draft.done[: index + 1], *draft.done[index:])
    operation = draft.done[index]
    critique = f"You use the number {operation.number} twice, but it counts only once: {operation.reason}."
    return replace(draft, done=done), critique


def _wrong_order(draft: Draft, dice: Dice) -> tuple[Draft, str] | None:
    turned = {"-": "from", "from": "-"}
    places = [index for index, operation in enumerate(draft.done) if operation.symbol in turned]
    if not places:
        return None
    index = dice.pick(places)
    right = draft.done[index]
    critique = f"The subtraction is turned around: {right.reason}, so check what is subtracted from what."
    return replace(draft, done=_at(draft.done, index, replace(right, symbol=turned[right.symbol]))), critique


# ---- mistakes in how the code is written ----


def _slip(draft: Draft, mistake: str, problem: Problem, dice: Dice) -> tuple[Draft, str] | None:
    """Make a mistake of the code alone; the variant is the part of `slip` after the colon."""
    match mistake:
        case "name":
            other = dice.pick([name for name in VARIABLES if name != draft.variable])
            slip = f"name:{other}"
            critique = "You use a name that is never defined: print the variable that holds the result."
        case "silent":
            slip = f"silent:{dice.pick(('bare', 'kept'))}"
            critique = "The code prints nothing: print the result."
        case "syntax" if draft.shape == "function":
            slip, critique = "syntax:colon", "The code is not valid Python: a colon is missing after def."
        case "syntax" if draft.shape in ("update", "chain") and any(op.symbol == "*" for op in draft.done):
            slip, critique = "syntax:times", "The code is not valid Python: multiply with an asterisk."
        case "syntax":
            slip, critique = "syntax:close", "The code is not valid Python: close the parenthesis."
        case "quoted":
            slip = "quoted:"
            critique = f"The number {draft.start} is written as text: remove the quotes."
        case "floor" if problem.answer.denominator == 1:
            return None
        case "floor":
            slip = f"floor:{dice.pick(('divide', 'divide', 'int', 'round'))}"
            critique = "The answer is not a whole number: keep the decimals of the division."
        case "parentheses":
            slip = "parentheses:"
            critique = "Python multiplies and divides first: put the part before it in parentheses."
        case _:
            raise ValueError(f"unknown mistake {mistake!r}")
    spoiled = replace(draft, slip=slip)
    return (spoiled, critique) if _code(spoiled) != _code(draft) else None


# ---- from draft to text ----


def _thoughts(draft: Draft) -> list[str]:
    orders = [ORDERS[op.symbol].format(n=op.number) for op in draft.said]
    if draft.voice == "short":
        return [f"Step 1: Start with {draft.said_start}, then {', then '.join(orders)}."]
    sentences = [
        f"{op.reason[0].upper()}{op.reason[1:]}, so {order}."
        for op, order in zip(draft.said, orders, strict=True)
    ]
    if draft.voice == "line":
        return [f"Step 1: {' '.join([f'{draft.opening}.', *sentences])}"]
    return [f"Step {n}: {line}" for n, line in enumerate([f"{draft.opening}.", *sentences], start=1)]


def _code(draft: Draft) -> list[str]:
    """Return the lines of code, with the slip of the draft in them."""
    kind, _, variant = draft.slip.partition(":")
    start = f'"{draft.start}"' if kind == "quoted" else str(draft.start)
    if kind == "name" and draft.shape == "direct":
        # the start value was never given this name
        start = variant
    lines = _shaped(draft, start, parentheses=kind != "parentheses")
    last = lines[-1]
    printed = last.removeprefix("print(").removesuffix(")")
    match kind, variant:
        case "name", _ if draft.shape == "function":
            # the variable is local to the function
            lines[-1] = f"print({draft.variable})"
        case "name", _ if draft.shape != "direct":
            lines[-1] = f"print({variant})"
        case "silent", "bare":
            lines[-1] = printed
        case "silent", _:
            lines[-1] = f"final = {printed}"
        case "syntax", "close":
            lines[-1] = last.removesuffix(")")
        case "syntax", "colon":
            lines[0] = lines[0].removesuffix(":")
        case "syntax", "times":
            lines = [line.replace(" * ", " x ") for line in lines]
        case "floor", "divide":
            lines = [line.replace(" / ", " // ").replace(" /= ", " //= ") for line in lines]
        case "floor", _:
            lines[-1] = f"print({variant}({printed}))"
    return lines


def _shaped(draft: Draft, start: str, *, parentheses: bool) -> list[str]:
    """Return the lines of code in the draft's shape; the last one is `print(...)`."""
    name, last = draft.variable, f"print({draft.variable})"
    match draft.shape:
        case "update":
            return [f"{name} = {start}", *(f"{name} = {_applied(name, op)}" for op in draft.done), last]
        case "inplace":
            return [f"{name} = {start}", *(_applied_in_place(name, op) for op in draft.done), last]
        case "chain":
            lines = [f"{ORDINALS[0]} = {start}"]
            for old, new, operation in zip(ORDINALS, ORDINALS[1:], draft.done, strict=False):
                lines.append(f"{new} = {_applied(old, operation)}")
            return [*lines, f"print({ORDINALS[len(draft.done)]})"]
        case "expression":
            return [f"{name} = {_expression(start, draft.done, parentheses)}", last]
        case "direct":
            return [f"print({_expression(start, draft.done, parentheses)})"]
        case "function":
            before = _expression(start, draft.done[:-1], parentheses)
            return [
                "def solve():",
                f"    {name} = {before}",
                f"    return {_applied(name, draft.done[-1])}",
                "print(solve())",
            ]
        case _:
            raise ValueError(f"unknown shape {draft.shape!r}")


def _applied(operand: str, operation: Operation) -> str:
    if operation.symbol == "from":
        return f"{operation.number} - {operand}"
    return f"{operand} {operation.symbol} {operation.number}"


def _applied_in_place(name: str, operation: Operation) -> str:
    if operation.symbol == "from":
        return f"{name} = {_applied(name, operation)}"
    return f"{name} {operation.symbol}= {operation.number}"


def _expression(start: str, operations: tuple[Operation, ...], parentheses: bool) -> str:
    """Write all operations as one expression, with parentheses where precedence needs them, or (a mistake) nowhere."""
    text, is_sum = start, False
    for operation in operations:
        binds_tighter = operation.symbol in "*/" or operation.symbol == "from"
        if parentheses and is_sum and binds_tighter:
            text = f"({text})"
        text = _applied(text, operation)
        is_sum = operation.symbol in ("+", "-", "from")
    return text
