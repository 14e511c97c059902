"""A conversation as the texts that the student reads, and where in them the responses stand.

By the chat template, one text for all turns; or verbatim, one text for each scored turn: its
history by the template, with the generation prompt, then the response as it stands. The latter
is what prompt-completion trainers do, and the only way for templates that delete reasoning.

Knows conversations and their layouts; knows nothing of tokens, models or scores.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rsr.engine.config import RenderMode, Turns
from rsr.engine.form import Form, fold, forms
from rsr.engine.layout import CharSpan, Layout, ReasoningDroppedError
from rsr.engine.layout_finder import LayoutFinder
from rsr.engine.messages import BadMessagesError, Conversation
from rsr.engine.probes import PLAIN, Pieces, cut, probe_turn
from rsr.engine.tags import unrepeated
from rsr.engine.template import ChatTemplate, RefusedByTemplateError

MAX_CACHED_LAYOUTS = 4096
_OWN_FIELDS = frozenset({"role", "content", "reasoning", "reasoning_field", "tool_calls"})
VERBATIM_NOTE = "rendered verbatim"
END_LEFT_OUT_NOTE = "end-of-turn token of their own left out"


class NothingSaidError(BadMessagesError):
    """No assistant turn that is to be scored says anything."""


@dataclass(frozen=True, slots=True)
class RenderedText:
    """One text that the student reads; spans are its responses, ascending."""

    text: str
    spans: list[CharSpan]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row's texts. notes: what was changed to get there, the same words for every such row."""

    texts: list[RenderedText]
    notes: tuple[str, ...]


class ConversationRenderer:
    """Renders conversations for one student; keeps the layouts of the shapes it has seen.

    mode: `ScorerConfig.render`. turns: `ScorerConfig.turns`.
    """

    def __init__(self, template: ChatTemplate, *, mode: RenderMode, turns: Turns) -> None:
        self._template = template
        self._mode = mode
        self._turns = turns
        self._layouts: dict[Hashable, Layout | BadMessagesError] = {}
        self._header, self._end_of_turn = self._frame_of_a_plain_turn()

    def render(self, conversation: Conversation) -> Rendered:
        """The row's texts. Raises `BadMessagesError`; `NothingSaidError` if nothing is scored."""
        if self._mode == "verbatim":
            conversation = self._without_ends(conversation)
        pieces = [cut(turn) for turn in conversation.turns]
        for turn, piece in zip(conversation.turns, pieces, strict=True):
            for text in (*piece.words, *_strings(turn.get("tool_calls"))):
                self._template.require_no_control_token(turn["role"], text, self._end_of_turn)
        scored = self._scored(conversation, pieces)
        row = _Row(conversation, pieces)
        if self._mode != "verbatim":
            try:
                rendered, form = self._by_template(row, scored)
                return Rendered([rendered], _notes(conversation, form))
            except ReasoningDroppedError:
                if self._mode == "template":
                    raise
        texts = [self._verbatim(row.until(index), index) for index in sorted(scored)]
        return Rendered(texts, (*conversation.notes, VERBATIM_NOTE))

    def _without_ends(self, conversation: Conversation) -> Conversation:
        """The text without the one end-of-turn token that a response may bring along.

        Engines return it with special tokens kept. A trainer would see it twice; the authors' code
        scores up to the first.
        """
        end = self._end_of_turn
        turns = [
            {**turn, "content": turn["content"].rstrip().removesuffix(end)}
            if end and turn["role"] == "assistant" and turn["content"].rstrip().endswith(end)
            else turn
            for turn in conversation.turns
        ]
        if turns == conversation.turns:
            return conversation
        return replace(conversation, turns=turns, notes=(*conversation.notes, END_LEFT_OUT_NOTE))

    def _scored(self, conversation: Conversation, pieces: Sequence[Pieces]) -> frozenset[int]:
        assistant = [i for i, t in enumerate(conversation.turns) if t["role"] == "assistant"]
        if not assistant:
            raise NothingSaidError("no assistant turn")
        wanted = [i for i in assistant if i >= conversation.first_scored]
        if self._turns == "last":
            wanted = wanted[-1:]
        said = [
            i for i in wanted if not pieces[i].is_blank or "tool_calls" in conversation.turns[i]
        ]
        if not said:
            raise NothingSaidError("empty response")
        return frozenset(said)

    def _by_template(self, row: "_Row", scored: frozenset[int]) -> tuple[RenderedText, Form]:
        """All turns in one text; context turns whole if the template can print them so."""
        assistant = row.assistant_turns()
        try:
            return self._laid_out(row, scored, assistant)
        except BadMessagesError:
            if assistant == scored:
                raise
            return self._laid_out(row, scored, scored)

    def _verbatim(self, row: "_Row", index: int) -> RenderedText:
        """Turn `index`, the last of `row`, after its history."""
        turn = row.conversation.turns[index]
        if "tool_calls" in turn:
            # Calls have no text of their own: what stands there is the template's.
            return self._by_template(row, frozenset({index}))[0]
        history = row.until(index - 1)
        try:
            prompt, _ = self._laid_out(history, frozenset(), history.assistant_turns(), True)
        except BadMessagesError:
            prompt, _ = self._laid_out(history, frozenset(), frozenset(), True)
        response = turn["content"]
        if "reasoning" in turn:
            response = fold(turn["reasoning"], response)
        start = prompt.text + self._header
        text = start + unrepeated(response, start)
        end = len(text) + len(self._end_of_turn)
        return RenderedText(text + self._end_of_turn, [CharSpan(len(start), len(text), end)])

    def _laid_out(
        self,
        row: "_Row",
        scored: frozenset[int],
        required: frozenset[int],
        is_prompt: bool = False,
    ) -> tuple[RenderedText, Form]:
        """`row` rendered and laid against its shape's layout, with its own context if need be."""
        layout = self._layout(row, scored, required, is_prompt)
        try:
            return self._matched(row, layout, is_prompt), layout.form
        except BadMessagesError as mismatch:
            # What the template does may depend on the words of the context.
            try:
                layout = self._find(row, scored, required, is_prompt, literal_context=True)
                return self._matched(row, layout, is_prompt), layout.form
            except BadMessagesError as error:
                raise mismatch from error

    def _matched(self, row: "_Row", layout: Layout, is_prompt: bool) -> RenderedText:
        messages = [layout.form.message(turn) for turn in row.conversation.turns]
        text, marks = self._render(row.conversation, messages, add_generation_prompt=is_prompt)
        spans = layout.match(text, messages, row.pieces)
        if self._template.marks_responses:
            _require_marked(text, spans, marks)
        return RenderedText(text, spans)

    def _render(
        self, conversation: Conversation, messages: Sequence[Mapping[str, Any]], **options: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        return self._template.render(
            messages,
            tools=conversation.tools,
            template_kwargs=conversation.template_kwargs,
            **options,
        )

    def _layout(
        self, row: "_Row", scored: frozenset[int], required: frozenset[int], is_prompt: bool
    ) -> Layout:
        shape = (row.shape(self._template.source), scored, required, is_prompt)
        found = self._layouts.get(shape)
        if found is None:
            try:
                found = self._find(row, scored, required, is_prompt)
            except BadMessagesError as error:
                found = error.with_traceback(None)
            # The values of tool calls are part of a shape, which no second row will have.
            if not row.has_calls:
                if len(self._layouts) >= MAX_CACHED_LAYOUTS:
                    self._layouts.clear()
                self._layouts[shape] = found
        if isinstance(found, BadMessagesError):
            raise found
        return found

    def _find(
        self,
        row: "_Row",
        scored: frozenset[int],
        required: frozenset[int],
        is_prompt: bool,
        *,
        literal_context: bool = False,
    ) -> Layout:
        turns = row.conversation.turns
        probes = [
            turn
            if literal_context and turn["role"] != "assistant"
            else self._shown(probe_turn(index, turn, piece))
            for index, (turn, piece) in enumerate(zip(turns, row.pieces, strict=True))
        ]
        problem: BadMessagesError | None = None
        for strict in (True, False):
            # In this order for every row: what was rendered before must not decide.
            for form in forms(turns):
                try:
                    finder = LayoutFinder(
                        self._template,
                        partial(self._render, row.conversation),
                        form,
                        probes,
                        row.pieces,
                        scored=scored,
                        required=required,
                        is_prompt=is_prompt,
                        literal_context=literal_context,
                    )
                    layout = finder.find(strict=strict)
                except BadMessagesError as error:
                    if problem is None or _weight(error) > _weight(problem):
                        problem = error
                else:
                    return layout
        assert problem is not None
        raise problem

    def _shown(self, turn: dict[str, Any]) -> dict[str, Any]:
        """`turn` with those of its fields that the template knows by name."""
        return {k: v for k, v in turn.items() if k in _OWN_FIELDS or k in self._template.source}

    def _frame_of_a_plain_turn(self) -> tuple[str, str]:
        """What a turn has before it that no generation prompt prints; its end-of-turn token."""
        user = {"role": "user", "content": "Zuser"}
        plain = {"role": "assistant", "content": PLAIN}
        try:
            bare, prompt, whole = (
                self._template.render(messages, add_generation_prompt=add)[0]
                for messages, add in (([user], False), ([user], True), ([user, plain], False))
            )
        except BadMessagesError:
            return "", ""
        before, _, after = whole.partition(PLAIN)
        has_prompt = bare != prompt or not before.startswith(bare)
        header = "" if has_prompt or not before[len(bare) :].strip() else before[len(bare) :]
        after = after.strip()
        tokens = self._template.control_tokens
        token = tokens.match(after) if tokens is not None else None
        return header, token.group() if token else after


def _weight(problem: BadMessagesError) -> int:
    """Which of the problems of several forms tells most about the template."""
    if isinstance(problem, ReasoningDroppedError):
        return 2
    return 0 if isinstance(problem, RefusedByTemplateError) else 1


class _Row:
    """A conversation with its turns cut to pieces."""

    def __init__(self, conversation: Conversation, pieces: Sequence[Pieces]) -> None:
        self.conversation = conversation
        self.pieces = pieces

    @property
    def has_calls(self) -> bool:
        return any("tool_calls" in turn for turn in self.conversation.turns)

    def until(self, index: int) -> "_Row":
        """Turns up to and with `index`."""
        if index + 1 == len(self.conversation.turns):
            return self
        whole = self.conversation
        turns = whole.turns[: index + 1]
        part = Conversation(turns, 0, whole.tools, whole.template_kwargs, whole.notes)
        return _Row(part, self.pieces[: index + 1])

    def assistant_turns(self) -> frozenset[int]:
        """Those that say something."""
        return frozenset(
            index
            for index, (turn, piece) in enumerate(
                zip(self.conversation.turns, self.pieces, strict=True)
            )
            if turn["role"] == "assistant" and (not piece.is_blank or "tool_calls" in turn)
        )

    def shape(self, source: str) -> Hashable:
        """Everything but the words, for a template of this `source`."""
        extras = [
            (index, name, _as_json(value))
            for index, turn in enumerate(self.conversation.turns)
            if len(turn) > 2
            for name, value in turn.items()
            if name == "tool_calls" or (name not in _OWN_FIELDS and name in source)
        ]
        conversation = self.conversation
        return (
            tuple(piece.shape for piece in self.pieces),
            tuple(extras),
            _as_json(conversation.tools) if conversation.tools else "",
            _as_json(conversation.template_kwargs) if conversation.template_kwargs else "",
        )


def _as_json(value: Any) -> str:
    return json.dumps(value, default=repr)


def _notes(conversation: Conversation, form: Form) -> tuple[str, ...]:
    return (*conversation.notes, form.note) if form.note else conversation.notes


def _strings(value: Any) -> list[str]:
    """All text in `value`, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return []


def _require_marked(text: str, spans: Sequence[CharSpan], marks: Sequence[tuple[int, int]]) -> None:
    """A template that marks what is generated must mark every response, and all of it."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(marks):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    for span in spans:
        response = text[span.start : span.end]
        start = span.start + len(response) - len(response.lstrip())
        end = span.start + len(response.rstrip())
        if not any(first <= start and end <= last for first, last in joined):
            raise BadMessagesError(
                "the chat template marks only a part of a response as generated",
                hint="try --render verbatim",
            )
