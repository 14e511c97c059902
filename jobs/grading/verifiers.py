r"""What compares an answer with the gold: mathematically, literally, by letter, or by the user.

Runs in a process that may be killed at any moment. The part of an answer that counts is, whichever
comes first: the last complete `\boxed{…}`; the rest of the last line, where that begins with
`####`, `A:` or `Answer:`; for math any other formula or number that math-verify finds, the last
one first.
"""

import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from rsr.jobs.grading.grades import Grade, GradeStatus

Verifier = Callable[[str, str], Grade]
"""Compares an answer, without its reasoning, with the gold."""

BUILT_IN = ("math", "exact", "mcq")
BOX = re.compile(r"\\f?boxed\s*\{")
ESCAPED_OR_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
MARKED_LINE = re.compile(
    r"\s*(?:\*\*|#+\s+)?(?:####|(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:|A:)\s*(?:\*\*)?(.*)",
    re.IGNORECASE,
)
"""A line that says that it is the answer."""
CHOICE = re.compile(r"(?:^|[\s*(:])([A-J])(?:[\s*).,:]|$)")
CHOICE_SAID = re.compile(r"answer(?:\s+is)?\s*:?\s*\**\(?([A-J])\)?(?![A-Za-z])", re.IGNORECASE)
CHOICE_OF_LINE = re.compile(r"\(([A-J])\)|(?:^|\s)([A-J])[.)]?$")
"""A letter as the answer of a line of prose, where A and I are words."""
ONE_CHOICE = re.compile(r"(?:\\text(?:bf)?\s*\{)?\s*\(?\s*([A-Ja-j])\s*\)?\s*\}?\s*[.:]?")
NUMBER_AND_WORDS = re.compile(
    r"([$€£]?-?[\d,.]*\d(?:/\d+)?\s*%?)\s+"
    r"(?!pi\b|sqrt|log|ln|sin|cos|tan)[A-Za-z]{2,}[A-Za-z ,.()'-]*"
)
"""`18 eggs left over`: otherwise a product of as many symbols as letters."""
MATHEMATICAL = re.compile(r"\$[^$]+\$|\\\(|\\\[|\\boxed")
"""Text that says itself where its formulae are."""
MEANINGLESS = re.compile(r"\\left|\\right|\\[!,;: ]|\s|\$(?!\d)|(?<!\d)\.$")


class VerifierError(ValueError):
    """A verifier cannot be had: one line that says why."""


def load_verifier(name: str) -> Verifier:
    """A built-in by its name, or MODULE:FUNCTION; raises `VerifierError` if there is none such.

    FUNCTION takes the answer and the gold, both texts, and returns whether they agree; or a pair
    of that and the text that it compared; or None in the place of a verdict if it cannot use the
    gold.
    """
    if name == "math":
        return _math_verifier()
    if name == "exact":
        return verify_exact
    if name == "mcq":
        return verify_choice
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise VerifierError(f"expected {', '.join(BUILT_IN)} or MODULE:FUNCTION, found {name!r}")
    sys.path.append("")  # The user's folder, after everything that is installed.
    try:
        function = getattr(import_module(module), attribute)
    except Exception as error:
        raise VerifierError(f"{name} cannot be imported: {error}") from error
    if not callable(function):
        raise VerifierError(f"{name} is {type(function).__name__}, not a function")
    return partial(_ask_function, function)


def verify_exact(answer: str, gold: str) -> Grade:
    """Whether the texts are equal but for white space and a full stop at the end."""
    found = final_part(answer)
    extracted = answer.strip() if found is None else found
    same = _plain(extracted) == _plain(final_part(gold) or gold)
    return Grade(GradeStatus.CORRECT if same else GradeStatus.WRONG, extracted)


def verify_choice(answer: str, gold: str) -> Grade:
    """Whether the letters of a multiple choice, A to J, are the same."""
    wanted = ONE_CHOICE.fullmatch((final_part(gold) or gold).strip())
    if wanted is None:
        return Grade(GradeStatus.GOLD_UNPARSABLE, detail=f"{gold!r} is no letter from A to J")
    letter = _chosen_letter(answer)
    if letter is None:
        return Grade(GradeStatus.NO_ANSWER)
    same = letter == wanted[1].upper()
    return Grade(GradeStatus.CORRECT if same else GradeStatus.WRONG, letter)


def final_part(text: str) -> str | None:
    r"""The last complete `\boxed{…}`'s content, else what a marked last line says, else None."""
    if (boxed := last_box(text)) is not None:
        return boxed.strip()
    last_line = text.rstrip().rpartition("\n")[2]
    marked = MARKED_LINE.fullmatch(last_line)
    if marked is not None and (said := marked[1].removesuffix("**").strip()):
        return said
    return None


def last_box(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}` whose braces close, the outermost where they nest."""
    found, end_of_last = None, 0
    for start in BOX.finditer(text):
        if start.start() < end_of_last:
            continue
        depth = 1
        for mark in ESCAPED_OR_BRACE.finditer(text, start.end()):
            depth += {"{": 1, "}": -1}.get(mark.group(), 0)
            if not depth:
                found, end_of_last = text[start.end() : mark.start()], mark.end()
                break
    return found


def _chosen_letter(answer: str) -> str | None:
    part = final_part(answer)
    for text in filter(None, (part, answer.strip())):
        if whole := ONE_CHOICE.fullmatch(text):
            return whole[1].upper()
    if part is not None and (named := CHOICE.findall(part)):
        return str(named[0])
    if said := CHOICE_SAID.findall(answer):
        return str(said[-1]).upper()
    last_line = answer.rstrip().rpartition("\n")[2]
    named = [letter for pair in CHOICE_OF_LINE.findall(last_line) for letter in pair if letter]
    return str(named[-1]) if named else None


@dataclass(frozen=True, slots=True)
class _Parsed:
    """What math-verify made of a text. values: expressions. text: what it took it from."""

    values: list[Any]
    text: str | None


def _math_verifier() -> Verifier:
    """math-verify, imported here: the run's own process, and the other verifiers, go without."""
    try:
        from math_verify import (
            ExprExtractionConfig,
            LatexExtractionConfig,
            parse,
            verify,
        )
    except ImportError as error:
        raise VerifierError(
            f"math-verify cannot be imported ({error}): pip install 'rsr-engine[grade]'"
        ) from error
    # It says each time that nobody limits its time; the process that runs it is limited.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(text: str) -> _Parsed:
        found = parse(text, configs, parsing_timeout=None)
        texts = [value for value in found if isinstance(value, str)]
        return _Parsed(
            [value for value in found if not isinstance(value, str)], texts[0] if texts else None
        )

    def read_part(part: str) -> _Parsed:
        if counted := NUMBER_AND_WORDS.fullmatch(part):
            return read(counted[1])
        parsed = read(part if MATHEMATICAL.search(part) else rf"\boxed{{{part}}}")
        return parsed if parsed.values else read(part)

    def grade(answer: str, gold: str) -> Grade:
        gold_part = final_part(gold) or gold.strip()
        part = final_part(answer)
        if part is not None and _plain(part) == _plain(gold_part):
            return Grade(GradeStatus.CORRECT, part)
        wanted = read_part(gold_part)
        if not wanted.values:
            detail = f"math-verify finds no expression in {gold_part!r}"
            return Grade(GradeStatus.GOLD_UNPARSABLE, part, detail)
        found = read(answer) if part is None else read_part(part)
        extracted = part if part is not None else found.text
        if not found.values and not found.text:
            status = GradeStatus.NO_ANSWER if not part else GradeStatus.WRONG
            return Grade(status, part)
        same = verify(wanted.values, found.values, timeout_seconds=None)
        return Grade(GradeStatus.CORRECT if same else GradeStatus.WRONG, extracted)

    return grade


def _plain(text: str) -> str:
    """The text without what changes nothing of its meaning."""
    text = text.replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac").strip().rstrip(".")
    return MEANINGLESS.sub("", text)


def _ask_function(function: Callable[[str, str], Any], answer: str, gold: str) -> Grade:
    told = function(answer, gold)
    verdict, extracted = told if isinstance(told, tuple) and len(told) == 2 else (told, None)
    if extracted is not None and not isinstance(extracted, str):
        extracted = json.dumps(extracted, default=str)
    match verdict:
        case None:
            return Grade(GradeStatus.GOLD_UNPARSABLE, extracted)
        case bool():
            return Grade(GradeStatus.CORRECT if verdict else GradeStatus.WRONG, extracted)
    expected = "expected True, False or None, alone or with the text that was compared"
    raise TypeError(f"the verifier returned {verdict!r}; {expected}")
