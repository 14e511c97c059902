"""Finds where a chat template puts what the messages say: once for each shape of conversation.

The words of a conversation are replaced by probe words, the result is rendered, and the rendering
shows where each message went, what the template put around it, and whether it was printed at all.

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
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rsr.engine.form import PARTS, UNOPENED, Form
from rsr.engine.layout import Layout, Slot, dropped, escaped, rewritten, squeeze
from rsr.engine.messages import BadMessagesError
from rsr.engine.probes import PLAIN, PROBE, Pieces, first_closing, probe_value
from rsr.engine.tags import CLOSING, DOUBLED_OPENING, LAST_EMPTY, LAST_OPENING, OPENING
from rsr.engine.template import ChatTemplate

Render = Callable[..., tuple[str, list[tuple[int, int]]]]
_PRINTED_PART = re.compile(r"""['"]type['"]""")


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
            body = squeeze(self._text[start:end])
            content = self._messages[index].get("content")
            slots.append(
                Slot(
                    literal=self._text[last:start],
                    turn=index,
                    body=body,
                    is_scored=index in self._scored,
                    is_whole=isinstance(content, str) and body == squeeze(content),
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
        squeezed, cursor = squeeze(self._text) if self._literal_context else "", 0
        for index, turn in enumerate(self._turns):
            if turn["role"] == "assistant":
                continue
            if not self._literal_context:
                if self._pieces[index].words and not self._hits_of(index):
                    raise rewritten(turn["role"], index)
                continue
            content = squeeze(turn["content"])
            for variant in (content, squeeze(escaped(turn["content"]))):
                found = squeezed.find(variant, cursor)
                if found >= 0:
                    cursor = found + len(variant)
                    break
            else:
                raise rewritten(turn["role"], index)

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
            raise dropped(index)
        raise rewritten("assistant", index)

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
                    return anchor + len(header), LAST_OPENING.sub("", more)
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
        return sorted({LAST_OPENING.sub("", header) for header in headers}, key=len, reverse=True)

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
        return LAST_OPENING.sub("", prompt[len(bare) :]) if prompt.startswith(bare) else ""

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
        if DOUBLED_OPENING.search(region):
            raise rewritten("assistant", index)
        if self._form.reasoning == PARTS and _PRINTED_PART.search(region):
            raise rewritten("assistant", index)
        if self._form.reasoning == UNOPENED and not self._is_opened(index, start):
            raise rewritten("assistant", index)
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
        closing = first_closing(kinds) if isinstance(kinds, tuple) else 0
        is_blank = closing > 0 and None not in kinds[:closing]
        return (LAST_EMPTY if is_blank else LAST_OPENING).search(before) is not None

    def _check_tag_counts(
        self, index: int, content: str, region: str, start: int, strict: bool
    ) -> None:
        opens, closes = len(OPENING.findall(content)), len(CLOSING.findall(content))
        printed_opens, printed_closes = len(OPENING.findall(region)), len(CLOSING.findall(region))
        if printed_opens >= opens and printed_closes >= closes:
            if strict and (printed_opens > max(1, opens) or printed_closes > max(1, closes)):
                raise rewritten("assistant", index)
            return
        if CLOSING.search(self._text[:start].rstrip()[-12:]) and not PROBE.search(
            CLOSING.split(content)[0]
        ):
            # An empty chain of thought that the generation prompt has printed already.
            return
        hits = self._hits_of(index)
        separated = all(
            self._text[one.end() : other.start()].strip() for one, other in pairwise(hits)
        )
        if printed_opens or printed_closes or len(hits) < 2 or not separated:
            raise dropped(index)

    def _check_calls(self, index: int, region: str) -> None:
        """Every name and value of the turn's tool calls is printed, shown by probe calls."""
        calls = self._turns[index]["tool_calls"]
        if self._form.null_content and "None" in region and "None" not in json.dumps(calls):
            raise rewritten("assistant", index)
        expected: list[str] = []
        probe = {**self._turns[index], "tool_calls": probe_value(calls, expected)}
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


def _common_length(one: str, other: str) -> int:
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return min(len(one), len(other))
