"""Where a chat template puts what the messages say: found once for each shape of conversation.

A conversation's *shape* is everything about it but its words. Its words are replaced by probe
words, the result is rendered, and the rendering shows where each message went, what the template
put around it, and whether it was printed at all. A real row of that shape is then rendered once
and laid against this: every character of it must be the template's or a message's, in the same
places, or the row is refused. Nothing is searched for, so nothing can be found in a wrong place.

Where a response begins: after the longest text that is both the generation prompt's and the
turn's. A chain of thought that the prompt *opens* still counts as the student's words, as in the
published code; one that the prompt closes does not, even where the message itself begins with it.
Where a response ends: before the end-of-turn token. What the template adds in between (an empty
chain of thought, channel names, the syntax of tool calls) is part of the response, for training
puts loss on it.

Knows templates and messages; knows nothing of tokens, models or scores.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rsr.engine.form import PARTS, UNOPENED, Form, without_opener
from rsr.engine.messages import REASONING_TAG, BadMessagesError
from rsr.engine.template import ChatTemplate

PROBE = re.compile(r"Zq(\d+)q(\d+)Z")
PLAIN = "ZqplainqZ"
MAX_END_CANDIDATES = 64
"""How often the text after a message may recur inside it before the row is given up."""
_OPENER = re.compile(r"(?:<think(?:ing)?>|\[THINK\])\s*$")
_EMPTY_THOUGHT = re.compile(r"\s*<think(?:ing)?>\s*</think(?:ing)?>\s*")
_OPENED_AND_CLOSED = re.compile(r"<think(?:ing)?>\s*</think(?:ing)?>\s*$")
_DOUBLED_OPENER = re.compile(r"<think(?:ing)?>\s*<think(?:ing)?>")
_OPENS = re.compile(r"<think(?:ing)?>|\[THINK\]")
_CLOSES = re.compile(r"</think(?:ing)?>|\[/THINK\]")
_PRINTED_PART = re.compile(r"""['"]type['"]""")

Render = Callable[..., tuple[str, list[tuple[int, int]]]]


class ReasoningDroppedError(BadMessagesError):
    """The template prints a turn without its reasoning."""


@dataclass(frozen=True, slots=True)
class CharSpan:
    """One response in the rendered text: [start, end), and where its end-of-turn token ends."""

    start: int
    end: int
    end_of_turn: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a turn says, cut at its reasoning tags.

    words: the pieces, in the order in which a template prints them: reasoning from a field, then
    content; blank ones beside tags left out. shape: all else, hashable. closes: number of closing
    tags in the content. ends_with_word: whether the content's last piece is a word.
    """

    words: tuple[str, ...]
    shape: tuple[Any, ...]
    closes: int = 0
    ends_with_word: bool = True

    @property
    def is_blank(self) -> bool:
        return not self.words and not isinstance(self.shape[2], tuple)


@dataclass(frozen=True, slots=True)
class Slot:
    """One message's place in the text.

    literal: what the template prints before it, from the slot before. body: what it prints for
    the message, without white space, probe words in the place of words. is_whole: the body is the
    message's own text, nothing added or taken away. end_of_turn: characters from its end to the
    end of the end-of-turn token. prompted: what the generation prompt prints after `literal`, which
    is not the response's where a message itself begins with exactly this.
    """

    literal: str
    turn: int
    body: str
    is_scored: bool
    is_whole: bool
    end_of_turn: int
    prompted: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A shape's text: slots, and what follows the last; `form` is what the template was given."""

    form: Form
    slots: tuple[Slot, ...]
    tail: str

    def match(
        self,
        text: str,
        messages: Sequence[Mapping[str, Any]],
        pieces: Sequence[Pieces],
    ) -> list[CharSpan]:
        """Where the scored slots stand in `text`; raises `BadMessagesError` unless all fits.

        messages: in the layout's form. pieces: of the turns that they were made of.
        """
        spans, position = [], 0
        followers = [*(slot.literal for slot in self.slots), self.tail][1:]
        for slot, follower in zip(self.slots, followers, strict=True):
            if not text.startswith(slot.literal, position):
                raise _rewritten(messages[slot.turn]["role"], slot.turn)
            start = position + len(slot.literal)
            is_last = slot is self.slots[-1]
            position = _place(slot, text, start, follower, is_last, messages, pieces)
            if slot.is_scored:
                if text.startswith(slot.prompted, start, position):
                    start += len(slot.prompted)
                spans.append(CharSpan(start, position, position + slot.end_of_turn))
        if len(text) - position != len(self.tail) or not text.endswith(self.tail):
            raise _rewritten(messages[-1]["role"], len(messages) - 1)
        return spans


def cut(turn: Mapping[str, Any]) -> Pieces:
    """The words and the shape of one turn of a `Conversation`, fields that it has aside."""
    content = turn["content"]
    words: list[str] = []
    if "reasoning" in turn:
        words.append(turn["reasoning"])
    if turn["role"] != "assistant" or ("hink>" not in content and "THINK]" not in content):
        if content:
            words.append(content)
            return Pieces(tuple(words), (turn["role"], turn.get("reasoning_field"), None))
        return Pieces(
            tuple(words), (turn["role"], turn.get("reasoning_field"), content), ends_with_word=False
        )
    kinds: list[str | None] = []
    last = 0
    for tag in (*REASONING_TAG.finditer(content), None):
        piece = content[last : tag.start() if tag else len(content)]
        if piece and not piece.isspace():
            words.append(piece)
            kinds.append(None)
        if tag:
            kinds.append(tag.group())
            last = tag.end()
    return Pieces(
        tuple(words),
        (turn["role"], turn.get("reasoning_field"), tuple(kinds)),
        closes=sum(kind is not None and bool(_CLOSES.fullmatch(kind)) for kind in kinds),
        ends_with_word=kinds[-1] is None,
    )


def probe_turn(index: int, turn: Mapping[str, Any], pieces: Pieces) -> dict[str, Any]:
    """`turn` with probe words for its words."""
    probes = (f"Zq{index}q{number}Z" for number in range(len(pieces.words)))
    probe = {k: v for k, v in turn.items() if k != "content"}
    if "reasoning" in turn:
        probe["reasoning"] = next(probes)
    kinds = pieces.shape[2]
    if kinds is None:
        probe["content"] = next(probes)
    elif isinstance(kinds, str):
        probe["content"] = kinds
    else:
        probe["content"] = _probe_content(kinds, probes)
    return probe


def _closing(kinds: Sequence[str | None]) -> int:
    """Where the first closing tag is; 0 if there is none."""
    return next((i for i, kind in enumerate(kinds) if kind and _CLOSES.fullmatch(kind)), 0)


def _probe_content(kinds: Sequence[str | None], probes: Iterator[str]) -> str:
    """Words and tags with the white space between them that most templates write."""
    content = ""
    for kind in kinds:
        if kind is None:
            content += next(probes)
        elif _OPENS.fullmatch(kind):
            content += ("\n" if content else "") + kind + "\n"
        else:
            content = content.rstrip("\n") + "\n" + kind + "\n\n"
    return content.rstrip("\n")


class LayoutFinder:
    """Finds the layout of one shape in one form; raises `BadMessagesError` where there is none.

    turns: of a `Conversation`, words replaced by probe words; with `literal_context`, only those
    of assistant turns. scored: indices of the assistant turns that are responses. required:
    indices of those that must be printed whole; others may lose their reasoning. is_prompt:
    the text ends with the generation prompt.
    """

    def __init__(
        self,
        template: ChatTemplate,
        render: Render,
        form: Form,
        turns: Sequence[Mapping[str, Any]],
        pieces: Sequence[Pieces],
        *,
        scored: frozenset[int],
        required: frozenset[int],
        is_prompt: bool = False,
        literal_context: bool = False,
    ) -> None:
        self._template = template
        self._render = render
        self._form = form
        self._turns = turns
        self._pieces = pieces
        self._scored = scored
        self._required = required
        self._literal_context = literal_context
        self._messages = [form.message(turn) for turn in turns]
        self._is_prompt = is_prompt
        self._text = render(self._messages, add_generation_prompt=self._is_prompt)[0]
        self._hits = list(PROBE.finditer(self._text))

    def find(self, *, strict: bool) -> Layout:
        """strict: also refuse tags that the template prints beside the message's own."""
        self._require_context()
        regions: list[tuple[int, int, int]] = []
        ends_of_turn: dict[int, int] = {}
        prompted: dict[int, str] = {}
        for index, turn in enumerate(self._turns):
            if turn["role"] != "assistant":
                regions += [(*hit.span(), index) for hit in self._hits_of(index)]
            elif not self._pieces[index].is_blank or "tool_calls" in turn:
                self._require_said(index)
                start, prompted[index] = self._start(index)
                end = self._end(index, start)
                ends_of_turn[index] = self._end_of_turn(end)
                self._check_tags(index, start, end, strict)
                self._require_one_turn(index, start, end, ends_of_turn[index])
                regions.append((start, end, index))
        return self._layout(sorted(regions), ends_of_turn, prompted)

    def _layout(
        self,
        regions: list[tuple[int, int, int]],
        ends_of_turn: Mapping[int, int],
        prompted: Mapping[int, str],
    ) -> Layout:
        slots, last = [], 0
        for start, end, index in regions:
            if start < last:
                raise BadMessagesError("the chat template mixes the text of two turns")
            body = _squeeze(self._text[start:end])
            content = self._messages[index].get("content")
            slots.append(
                Slot(
                    literal=self._text[last:start],
                    turn=index,
                    body=body,
                    is_scored=index in self._scored,
                    is_whole=isinstance(content, str) and body == _squeeze(content),
                    end_of_turn=ends_of_turn.get(index, 0),
                    prompted=prompted.get(index, ""),
                )
            )
            last = end
        return Layout(self._form, tuple(slots), self._text[last:])

    def _hits_of(self, index: int) -> list[re.Match[str]]:
        return [hit for hit in self._hits if int(hit[1]) == index]

    def _require_context(self) -> None:
        """Every message that is not an assistant's is printed."""
        squeezed, cursor = _squeeze(self._text) if self._literal_context else "", 0
        for index, turn in enumerate(self._turns):
            if turn["role"] == "assistant":
                continue
            if not self._literal_context:
                if self._pieces[index].words and not self._hits_of(index):
                    raise _rewritten(turn["role"], index)
                continue
            content = _squeeze(turn["content"])
            for variant in (content, _squeeze(_escaped(turn["content"]))):
                found = squeezed.find(variant, cursor)
                if found >= 0:
                    cursor = found + len(variant)
                    break
            else:
                raise _rewritten(turn["role"], index)

    def _require_said(self, index: int) -> None:
        """Every word of a required turn once and in order; of another, its last."""
        printed = [int(hit[2]) for hit in self._hits_of(index)]
        expected = list(range(len(self._pieces[index].words)))
        if printed == expected:
            return
        if index not in self._required:
            needs = expected[-1:] if self._pieces[index].ends_with_word else []
            if printed[-1:] == needs or not needs:
                return
        if self._says_reasoning(index) and printed == expected[len(expected) - len(printed) :]:
            raise _dropped(index)
        raise _rewritten("assistant", index)

    def _says_reasoning(self, index: int) -> bool:
        return "reasoning" in self._turns[index] or len(self._pieces[index].words) > 1

    def _start(self, index: int) -> tuple[int, str]:
        """Where the response of turn `index` begins, and what the generation prompt has there."""
        hits = self._hits_of(index)
        try:
            prompt = self._render(self._messages[:index], add_generation_prompt=True)[0]
        except BadMessagesError:
            prompt = None
        first = hits[0].start() if hits else len(self._text)
        if prompt is not None:
            words = list(PROBE.finditer(prompt))
            anchor, before = self._after_same_word(words, self._hits)
            own = prompt[before:]
            for header in self._headers(index, own, words):
                if self._text.startswith(header, anchor) and anchor + len(header) <= first:
                    more = own[len(header) :] if own.startswith(header) else ""
                    return anchor + len(header), _OPENER.sub("", more)
        header = self._role_header()
        between = self._text[
            max((h.end() for h in self._hits if h.end() <= first), default=0) : first
        ]
        if header and between.count(header) == 1:
            return first - len(between) + between.index(header) + len(header), ""
        raise BadMessagesError(
            "the chat template prints an assistant turn that does not begin like its "
            "generation prompt",
            detail=f"assistant turn {index} does not begin like the generation prompt",
            hint="try --render verbatim",
        )

    def _after_same_word(
        self, words: Sequence[re.Match[str]], hits: Sequence[re.Match[str]]
    ) -> tuple[int, int]:
        """Ends of the last of `words` among `hits` and in its own text; 0 if there are none."""
        if not words:
            return 0, 0
        name = words[-1].group()
        rank = sum(word.group() == name for word in words)
        same = [hit for hit in hits if hit.group() == name]
        return (same[rank - 1].end() if len(same) >= rank else 0), words[-1].end()

    def _headers(self, index: int, prompt: str, words: Sequence[re.Match[str]]) -> list[str]:
        """What may stand between the message before turn `index` and its response, longest first.

        prompt: the generation prompt there, from the last message on.
        """
        plain = {"role": "assistant", "content": PLAIN}
        again = {"role": "user", "content": "Zuser"}
        rendered = []
        for following in ([plain], [plain, again]):
            try:
                text = self._render([*self._messages[:index], *following])[0]
            except BadMessagesError:
                continue
            anchor, _ = self._after_same_word(words, list(PROBE.finditer(text)))
            found = text.find(PLAIN, anchor)
            if found >= 0:
                rendered.append(text[anchor:found])
        if rendered and self._has_no_generation_prompt(index):
            # Nothing says what of the turn's beginning is the student's, so nothing is.
            headers = {r for r in rendered if r[len(prompt) :].strip()} or {prompt}
        else:
            headers = {prompt, *(self._common(prompt, r) for r in rendered)}
        return sorted({_OPENER.sub("", header) for header in headers}, key=len, reverse=True)

    def _has_no_generation_prompt(self, index: int) -> bool:
        try:
            with_prompt, without = (
                self._render(self._messages[:index], add_generation_prompt=add)[0]
                for add in (True, False)
            )
        except BadMessagesError:
            return False
        return with_prompt == without

    def _common(self, one: str, other: str) -> str:
        """The common beginning of both, no control token cut in two."""
        length = _common_length(one, other)
        if self._template.control_tokens is not None:
            for token in self._template.control_tokens.finditer(one):
                if token.start() < length < token.end():
                    length = token.start()
        return one[:length]

    def _role_header(self) -> str:
        """The generation prompt of the simplest conversation."""
        user = {"role": "user", "content": "Zuser"}
        try:
            bare = self._render([user])[0]
            prompt = self._render([user], add_generation_prompt=True)[0]
        except BadMessagesError:
            return ""
        return _OPENER.sub("", prompt[len(bare) :]) if prompt.startswith(bare) else ""

    def _end(self, index: int, start: int) -> int:
        """Where the response of turn `index` ends, which begins at `start`."""
        hits = self._hits_of(index)
        last = hits[-1].end() if hits else start
        if self._pieces[index].ends_with_word and "tool_calls" not in self._turns[index]:
            return last
        after = self._text[last : self._next_hit(self._hits, last, len(self._text))]
        plain = self._after_plain(index)
        if plain is not None and after.endswith(plain):
            return last + len(after) - len(plain)
        return self._end_by_token(index, last)

    def _after_plain(self, index: int) -> str | None:
        """What would follow turn `index`, up to the next message, if it said one plain word."""
        plain = {"role": "assistant", "content": PLAIN}
        try:
            text = self._render(
                [*self._messages[:index], plain, *self._messages[index + 1 :]],
                add_generation_prompt=self._is_prompt,
            )[0]
        except BadMessagesError:
            return None
        found = text.find(PLAIN)
        if found < 0:
            return None
        end = found + len(PLAIN)
        return text[end : self._next_hit(list(PROBE.finditer(text)), end, len(text))]

    @staticmethod
    def _next_hit(hits: Sequence[re.Match[str]], position: int, default: int) -> int:
        return next((hit.start() for hit in hits if hit.start() >= position), default)

    def _end_by_token(self, index: int, last: int) -> int:
        """Before the control token that ends the turn where it ends like no plain turn does."""
        limit = len(self._text)
        if index + 1 < len(self._turns) or self._is_prompt:
            alone = self._render(self._messages[: index + 1])[0]
            limit = len(alone) if self._text.startswith(alone) else last
        region = self._text[last:limit].rstrip()
        if self._template.control_tokens is not None:
            for token in self._template.control_tokens.finditer(region):
                if token.end() == len(region):
                    return last + token.start()
        raise BadMessagesError(
            "nothing shows where an assistant turn ends in this chat template",
            detail=f"nothing shows where assistant turn {index} ends in this chat template",
        )

    def _end_of_turn(self, end: int) -> int:
        """Length of the end-of-turn token after `end`, with white space before it."""
        after = self._text[end : self._next_hit(self._hits, end, len(self._text))]
        stripped = after.lstrip()
        if self._template.control_tokens is not None:
            token = self._template.control_tokens.match(stripped)
            if token is not None:
                return len(after) - len(stripped) + token.end()
        if end + len(after) == len(self._text) and not self._is_prompt:
            return len(after.rstrip())
        plain = {"role": "assistant", "content": PLAIN}
        user = {"role": "user", "content": "Zuser"}
        try:
            last = self._render([user, plain])[0].rpartition(PLAIN)[2]
        except BadMessagesError:
            return 0
        return _common_length(after, last.rstrip())

    def _require_one_turn(self, index: int, start: int, end: int, end_of_turn: int) -> None:
        token = self._text[end : end + end_of_turn].strip()
        if token and token in self._text[start:end]:
            raise BadMessagesError(
                "the chat template prints an assistant turn as two",
                detail=f"the chat template prints assistant turn {index} as two",
            )

    def _check_tags(self, index: int, start: int, end: int, strict: bool) -> None:
        """The reasoning tags of a turn are printed once, and its tool calls at all."""
        region = self._text[start:end]
        if _DOUBLED_OPENER.search(region):
            raise _rewritten("assistant", index)
        if self._form.reasoning == PARTS and _PRINTED_PART.search(region):
            raise _rewritten("assistant", index)
        if self._form.reasoning == UNOPENED and not self._is_opened(index, start):
            raise _rewritten("assistant", index)
        if index in self._required:
            content = self._messages[index].get("content") or ""
            if isinstance(content, str):
                self._check_tag_counts(index, content, region, start, strict)
        if "tool_calls" in self._turns[index]:
            self._check_calls(index, region)

    def _is_opened(self, index: int, start: int) -> bool:
        """Whether the template prints the opening tag of turn `index` that was left to it."""
        kinds = self._pieces[index].shape[2]
        if "reasoning" not in self._turns[index] and not isinstance(kinds, tuple):
            return True
        hits = self._hits_of(index)
        before = self._text[start : hits[0].start() if hits else len(self._text)]
        closing = _closing(kinds) if isinstance(kinds, tuple) else 0
        is_blank = closing > 0 and None not in kinds[:closing]
        return (_OPENED_AND_CLOSED if is_blank else _OPENER).search(before) is not None

    def _check_tag_counts(
        self, index: int, content: str, region: str, start: int, strict: bool
    ) -> None:
        opens, closes = len(_OPENS.findall(content)), len(_CLOSES.findall(content))
        printed_opens, printed_closes = len(_OPENS.findall(region)), len(_CLOSES.findall(region))
        if printed_opens >= opens and printed_closes >= closes:
            if strict and (printed_opens > max(1, opens) or printed_closes > max(1, closes)):
                raise _rewritten("assistant", index)
            return
        if _CLOSES.search(self._text[:start].rstrip()[-12:]) and not PROBE.search(
            _CLOSES.split(content)[0]
        ):
            # An empty chain of thought that the generation prompt has printed already.
            return
        hits = self._hits_of(index)
        separated = all(
            self._text[one.end() : other.start()].strip() for one, other in pairwise(hits)
        )
        if printed_opens or printed_closes or len(hits) < 2 or not separated:
            raise _dropped(index)

    def _check_calls(self, index: int, region: str) -> None:
        """Every name and value of the turn's tool calls is printed, shown by probe calls."""
        calls = self._turns[index]["tool_calls"]
        if self._form.null_content and "None" in region and "None" not in json.dumps(calls):
            raise _rewritten("assistant", index)
        expected: list[str] = []
        probe = {**self._turns[index], "tool_calls": _probe_value(calls, expected)}
        messages = [*self._messages]
        messages[index] = self._form.message(probe)
        text = self._render(messages, add_generation_prompt=self._is_prompt)[0]
        reasoning = text.find(f"Zq{index}q0Z") if self._says_reasoning(index) else -1
        if expected and reasoning > text.find(expected[0]):
            raise BadMessagesError("the chat template prints reasoning after the tool calls")
        if not all(word in text for word in expected):
            raise BadMessagesError(
                "the chat template drops part of a tool call",
                detail=f"the chat template drops part of a tool call of assistant turn {index}",
            )


def _probe_value(value: Any, expected: list[str], *, top: str = "") -> Any:
    """`value` with probe words for names, keys and leaves, which are added to `expected`."""
    if isinstance(value, list):
        return [_probe_value(item, expected) for item in value]
    if isinstance(value, Mapping):
        if "function" in value:
            return {**value, "function": _probe_value(value["function"], expected, top="call")}
        if top == "" and "name" in value:
            top = "call"
        if top == "call":
            name = f"Zc{len(expected)}Z"
            expected.append(name)
            arguments = value.get("arguments")
            probe = {**value, "name": name}
            if arguments is not None:
                probe["arguments"] = _probe_value(arguments, expected, top="arguments")
            return probe
        probe = {}
        for item in value.values():
            name = f"Zc{len(expected)}Z"
            expected.append(name)
            probe[name] = _probe_value(item, expected, top="arguments")
        return probe
    if isinstance(value, str):
        expected.append(f"Zc{len(expected)}Z")
        return expected[-1]
    if isinstance(value, int | float) and not isinstance(value, bool):
        expected.append(str(7_000_000 + len(expected)))
        return int(expected[-1])
    return value


def unrepeated(response: str, prompt: str) -> str:
    """`response` without the opening tag or the empty chain of thought that `prompt` ends with."""
    if _OPENER.search(prompt):
        return without_opener(response)
    empty = _EMPTY_THOUGHT.match(response)
    return response[empty.end() :] if empty and _OPENED_AND_CLOSED.search(prompt) else response


def _place(
    slot: Slot,
    text: str,
    start: int,
    follower: str,
    is_last: bool,
    messages: Sequence[Mapping[str, Any]],
    pieces: Sequence[Pieces],
) -> int:
    """Where the message of `slot` ends in `text`, which it must fill from `start` to `follower`."""
    message = messages[slot.turn]
    content = message.get("content")
    if slot.is_whole and isinstance(content, str):
        for variant in _variants(content, message["role"]):
            end = start + len(variant)
            fits = text.startswith(variant, start) and text.startswith(follower, end)
            if fits and (not is_last or end + len(follower) == len(text)):
                return end
    filled = _fill(slot, pieces)
    for end in _possible_ends(text, start, follower, is_last):
        if _squeeze(text[start:end]) == filled:
            return end
    raise _rewritten(message["role"], slot.turn)


def _variants(content: str, role: str) -> Iterator[str]:
    """How a template may print a content: as it is, trimmed, as the inside of a JSON string."""
    yield content
    yield content.strip()
    yield content.rstrip()
    yield content.lstrip()
    if role != "assistant":
        for text in (content, content.strip()):
            yield _escaped(text)


def _escaped(text: str) -> str:
    """The inside of `text` as a JSON string, as `tojson` prints it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _possible_ends(text: str, start: int, follower: str, is_last: bool) -> Iterator[int]:
    if is_last or not follower:
        yield len(text) - len(follower)
        return
    found = text.find(follower, start)
    for _ in range(MAX_END_CANDIDATES):
        if found < 0:
            return
        yield found
        found = text.find(follower, found + 1)


def _fill(slot: Slot, pieces: Sequence[Pieces]) -> str:
    return PROBE.sub(lambda m: _squeeze(pieces[int(m[1])].words[int(m[2])]), slot.body)


def _squeeze(text: str) -> str:
    """`text` without white space, which templates trim and add as they like."""
    return "".join(text.split())


def _common_length(one: str, other: str) -> int:
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other))


def _rewritten(role: str, index: int) -> BadMessagesError:
    article = "an" if role == "assistant" else "a"
    return BadMessagesError(
        f"the chat template drops or rewrites {article} {role} turn",
        detail=f"the chat template drops or rewrites {role} turn {index}",
        hint="try --render verbatim" if role == "assistant" else "",
    )


def _dropped(index: int) -> ReasoningDroppedError:
    return ReasoningDroppedError(
        "the chat template drops the reasoning of an assistant turn",
        detail=f"the chat template drops the reasoning of assistant turn {index}",
        hint="try --render verbatim, or --turns last if only earlier turns lose theirs",
    )
