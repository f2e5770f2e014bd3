"""Where a model that talks has put its answer: the rules of the protocol `chat`.

Models that were asked for no tags answer "The correct answer is (C)." behind an explanation, or in front of
one. What is found here is a letter, or a piece of the text, which `data/answers/parser.py` then compares. Of
several rules the first that finds something decides; two answers by one rule are none. Linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from data.answers.normal import normal, spelled
from data.answers.numbers import parse_normal
from data.answers.parser import NONE, SEVERAL, TAGS, chosen, gold_number, listed_choices
from data.types import LETTERS, Example

THINK, END_THINK, ANSWER, END_ANSWER = TAGS
# characters of a completion; a longer one is unread
LONGEST = 50_000
# characters of an answer that stands alone on its line
LINE = 300
# a base model goes on and asks the next question itself
_NEXT_TURN = re.compile(r"\n[ \t]*(?:User|Human|Question|Q|Assistant) ?:")
_BOXED = re.compile(r"\\boxed ?\{((?:[^{}]|\{[^{}]*\})*)\}")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
# "the answer is", "I would choose"; what follows is the answer, if it is one
_STATED = re.compile(
    r"""(?:
    \b(?:answer|choice|option)(?:[ ](?:to|for)[ ][^.:\n]{1,60}?)?(?:[ ]?[:=]|,?[ ]
      (?:is|(?:would|should|must)[ ]be)(?:[ ](?:most[ ])?(?:likely|probably|clearly|therefore|thus))?[ ]?:?)
  | \bI(?:[ ]would|'d|[ ]will|'ll)?[ ](?:choose|select|pick|go[ ]with|say)
  | (?:答案|选项)[是为]?[ ]?:? | [故应]选
    )\s*(?:(?:the[ ])?(?:option|choice|answer|letter)\b(?![ ]is))?\s*:?\s*""",
    re.IGNORECASE | re.VERBOSE,
)
# "(B) is correct", "option B is the best choice"
_CORRECT = re.compile(
    r"""(?:
    \((?P<boxed>[A-Z])\)(?:[^().\n]{0,80}?)
  | \b(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Ll]etter)[ ](?P<bare>[A-Z])\b
    )[ ](?:is|would[ ]be|seems|appears)(?:[ ]to[ ]be)?[ ](?:the[ ]|most[ ])?
    (?:correct|right|best|answer|most[ ](?:likely|accurate))\b""",
    re.VERBOSE,
)
# a letter, in brackets or before what may follow a bare one; A and I are words, too
_LETTER = re.compile(
    r"(?:\((?P<boxed>[A-Za-z])\)|\[(?P<square>[A-Z])\]|(?P<bare>[A-Z])"
    r"(?![\w'’]|[-+] ?\d| (?!(?:because|since|as|which|with|or|and|is)\b)[a-z]))"
)
_FRONT = re.compile(
    r"\s*(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?:[.)]\s|\s*(?:\n|$)|(?=,? (?:because|since|as)\b)))"
)
_BRACKETED = re.compile(r"(?<!\w)[(\[]([A-Za-z])[)\]]")
_OTHER = re.compile(r"\s*(?:,|/|&|\bor\b|\band\b|\bnor\b)\s*(?:\(([A-Za-z])\)|([A-Z])\b(?! [a-z]))")
# what takes back or leaves open what follows it in the same clause
_DENIED = re.compile(
    r"\b(?:not|no|never|neither|nor|without|cannot|unlike|whether|if|rather than|instead of)\b|n't\b",
    re.IGNORECASE,
)
_WRONG = re.compile(r"\W{0,4}(?:(?:is|are|was|would be) (?:not|incorrect|wrong|false)|isn't|aren't|wasn't)\b")
_CLAUSE = re.compile(r"[.;:!?\n,]|\bbut\b")
# these are also said of other things
_POLAR = {"yes", "no"}
_NUMBER = re.compile(
    r"(?<![\w.,])[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?(?![\w/]|[.,][0-9])"
)
_SECOND = re.compile(r" ?(?:or|to|and|[-~–,;]) ?[-+]?[0-9]")
_REASON = re.compile(r"[,;]| (?:because|since|as)\b")
_SENTENCE = re.compile(r"[.!](?![0-9])(?=\s|$)|\n")


def find_answer(text: str, example: Example) -> tuple[str, str]:
    """The answer in a completion, and why there is none ("" if there is one)."""
    text = text.removeprefix(THINK)
    text = text.rpartition(END_THINK)[2]
    if text.count(ANSWER) > 1:
        return "", "several answer tags"
    said = text.rpartition(ANSWER)[2].partition(END_ANSWER)[0].strip()
    if not said:
        return "", "empty answer"
    if len(said) > LONGEST:
        return "", "answer too long"
    said = _NEXT_TURN.split(said, maxsplit=1)[0]
    choices = example.choices or listed_choices(example.asked)
    if choices:
        index = _choice(said, choices)
        if index >= 0:
            # in brackets, because a choice may be a letter itself
            return f"({LETTERS[index]})", ""
        if example.choices:
            return "", "not a choice" if index == NONE else "ambiguous"
    return _free(said, gold_number(example) is not None)


def _choice(text: str, choices: tuple[str, ...]) -> int:
    """The index of the choice that a text means: by what it states or a line of its own says, by its first
    letter, by its only letter, by the only choice that it names. NONE or SEVERAL."""
    # a list of all choices says nothing
    listed = (rf"\(?{letter}[).:]*\s*{re.escape(choice)}" for letter, choice in zip(LETTERS, choices))
    said = re.sub(r"\W+(?:or\W+)?".join(listed), "\n", spelled(text), flags=re.IGNORECASE).strip()
    stated = [chosen(each, choices) for each in _BOXED.findall(text)]
    stated += [_at(said, found.end(), choices) for found in _asserted(_STATED, said)]
    stated += [_index(found["boxed"] or found["bare"], choices) for found in _asserted(_CORRECT, said)]
    lines = (said.partition("\n")[0], said.rpartition("\n")[2])
    stated += [chosen(line, choices) for line in lines if len(line) <= LINE]
    letters = [_index(found[1], choices) for found in _asserted(_BRACKETED, said)]
    fronts = [_front(part, choices) for part in (said, said.rpartition("\n\n")[2])]
    for rule in (stated, fronts, letters, [*_named(said, choices)]):
        if found := {index for index in rule if index != NONE}:
            return found.pop() if len(found) == 1 else SEVERAL
    return NONE


def _index(letter: str, choices: Sequence[str]) -> int:
    """SEVERAL for a letter that no choice has: it names something, and no answer."""
    index = LETTERS.index(letter.upper())
    return index if index < len(choices) else SEVERAL


def _at(said: str, at: int, choices: tuple[str, ...]) -> int:
    """The choice that begins at a place: the sentence, or its part before a reason; else the letter."""
    line = said[at : at + LINE].partition("\n")[0]
    line = _SENTENCE.split(line, maxsplit=1)[0]
    for end in (len(line), *(found.start() for found in _REASON.finditer(line))):
        if (index := chosen(line[:end], choices)) >= 0:
            return index
    if letter := _LETTER.match(said, at):
        index = _index(letter["boxed"] or letter["square"] or letter["bare"], choices)
        return _beside(said, letter.end(), index, choices)
    return NONE


def _front(said: str, choices: tuple[str, ...]) -> int:
    """The letter at the front of a text."""
    found = _FRONT.match(said)
    if not found or _denied(said, found):
        return NONE
    return _beside(said, found.end(), _index(found[1] or found[2], choices), choices)


def _beside(said: str, end: int, index: int, choices: tuple[str, ...]) -> int:
    """A letter's choice; SEVERAL where a second letter or another choice's text stands behind it."""
    line = said[end:].partition("\n")[0][:LINE]
    own = chosen(line.lstrip(" ,:-"), choices)
    return index if own == index or (own == NONE and not _OTHER.match(line)) else SEVERAL


def _asserted(pattern: re.Pattern[str], said: str) -> Iterator[re.Match[str]]:
    """What a pattern finds, without what is taken back or left open."""
    return (found for found in pattern.finditer(said) if not _denied(said, found))


def _denied(said: str, found: re.Match[str]) -> bool:
    before = _CLAUSE.split(said[max(0, found.start() - 80) : found.start()])[-1]
    return bool(_DENIED.search(before) or _WRONG.match(said[found.end() : found.end() + 60]))


def _named(said: str, choices: tuple[str, ...]) -> Iterator[int]:
    """The choices that are named as words, the longer first: not "left" in "the left one"."""
    texts = {normal(choice).casefold(): index for index, choice in enumerate(choices)}
    names = [text for text in sorted(texts, key=len, reverse=True) if len(text) > 1 or text.isdigit()]
    if not names:
        return
    words = "|".join(r"\s+".join(map(re.escape, text.split())) for text in names)
    for found in re.finditer(rf"(?<![\w.,])(?:{words})(?!\w|[.,]\d)", said, re.IGNORECASE):
        text = " ".join(found[0].casefold().split())
        begins = not re.search(r"[^\s.!?*]\s*$", said[max(0, found.start() - 8) : found.start()])
        if text in _POLAR and not (begins and re.match(r"\s*(?:[,.;:!\n]|$)", said[found.end() :][:9])):
            continue
        if text in texts and (text in _POLAR or not _denied(said, found)):
            yield texts[text]


def _free(text: str, number: bool) -> tuple[str, str]:
    """An answer without choices: boxed or stated, all that is said, the last line; or the only number."""
    said = spelled(text).strip()
    stated = _BOXED.findall(text)
    for found in _STATED.finditer(said):
        rest = said[found.end() : found.end() + LINE]
        stated.append(_SENTENCE.split(rest, maxsplit=1)[0].strip())
    if not number:
        whole = stated or [said if len(said) <= LINE else said.rpartition("\n")[2]]
        alike = len({normal(each).casefold() for each in whole}) == 1
        return (whole[0].strip(), "") if alike and whole[0].strip() else ("", "ambiguous")
    lines = [said, said.partition("\n")[0], said.rpartition("\n")[2]]
    alone = [each for each in lines if parse_normal(normal(each))]
    bold = [_numeral(each) for each in _BOLD.findall(text)]
    for pieces in ([_numeral(each) for each in stated], alone, bold):
        if values := [each for each in pieces if each]:
            alike = len({parse_normal(normal(each)) for each in values}) == 1
            return (values[0], "") if alike else ("", "ambiguous")
    numbers = list(dict.fromkeys(_NUMBER.findall(said)))
    return (numbers[0], "") if len(numbers) == 1 else ("", "ambiguous" if numbers else "not a number")


def _numeral(text: str) -> str:
    """A text that is a number, else the number that it begins with, else ""."""
    if parse_normal(normal(text)):
        return text
    found = _NUMBER.match(text.strip())
    return found[0] if found and not _SECOND.match(text.strip(), found.end()) else ""
