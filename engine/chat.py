"""Trajectories to token ids and the spans of them that are scored.

The scored tokens follow the paper's code (`rsr_cal.py`): in every assistant turn, what stands
after the turn's header up to, not including, the end-of-turn token: what the student itself
would have to generate. Where a response stands in the text is `layout.py`'s to find.

Knows tokenizers; knows nothing of models, scores or files.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.mistral import convert_tekken_tokenizer, resolve_mistral_format
from transformers.utils import cached_file

from rsr.engine.config import RenderMode, TokenizerBackend, Turns
from rsr.engine.context import with_window, without_prompt
from rsr.engine.errors import first_line
from rsr.engine.messages import BadMessagesError, to_conversation
from rsr.engine.parts import with_parts
from rsr.engine.rendering import ConversationRenderer, NothingSaidError
from rsr.engine.template import ChatTemplate
from rsr.engine.tokenizer import TextTokenizer, TokenizedText
from rsr.engine.trajectory import (
    SEQUENCE_BREAK,
    EncodedTrajectory,
    InspectedTrajectory,
    Status,
    Trajectory,
)

TELLING_TEXT = 'a``` … "quoted" it\'s\n\n  12345 + 6\t日本語 Zürich 🙂'
"""Tokenizers of two kinds do not give the same ids for it."""


def load_tokenizer(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The student's tokenizer; `ValueError` if there is none or it cannot locate its tokens."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise ValueError(f"no usable tokenizer in {model!r}: {reason}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        tokenizer = _from_tekken(model, revision) or tokenizer
    if isinstance(tokenizer, LlamaTokenizer):
        tokenizer = _as_its_file_says(tokenizer, model, revision)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"the tokenizer of {model!r} is a {type(tokenizer).__name__}, which cannot tell where "
            "its tokens stand in the text; expected a tokenizer.json or a tekken.json"
        )
    return tokenizer


def _from_tekken(model: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """Mistral's `tekken.json` with offsets: the same ids, and its chat template as Jinja.

    Beside a tokenizer.json too, for transformers prefers it, and the two do not always agree.
    """
    _, file = resolve_mistral_format(model, revision=revision)
    return None if file is None else convert_tekken_tokenizer(file)


def _as_its_file_says(
    tokenizer: PreTrainedTokenizerBase, model: str, revision: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer.json`, where transformers makes another one of its vocabulary.

    Checkpoints of the DeepSeek family say that theirs is a LlamaTokenizer, which transformers 5
    builds anew: without the file's pre-tokenizer, and with other ids for nearly any text. It knows
    some of them by model type or by name on the hub, but not a copy in a folder.
    """
    file = cached_file(
        model, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if file is None:
        return tokenizer
    of_file, built = (
        backend.encode(TELLING_TEXT, add_special_tokens=False).ids
        for backend in (Tokenizer.from_file(file), tokenizer.backend_tokenizer)
    )
    if of_file == built:
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(model, revision=revision)


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a text begins with for this student: BOS, else the token that ends the text before."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ValueError(
        "unconditional=True: the student's tokenizer has neither a BOS nor an EOS token, after "
        "which a response without its prompt could stand"
    )


@dataclass(frozen=True, slots=True)
class _ToRead:
    """A row's texts with their scored characters, and how they came about; or why there are none.

    is_chat: a template made them, special tokens and all.
    """

    texts: list[tuple[str, list[tuple[int, int]]]]
    is_chat: bool = False
    notes: tuple[str, ...] = ()
    refusal: EncodedTrajectory | None = None


class TrajectoryEncoder:
    """Turns trajectories into what the student reads.

    Holds no state between but what it has learnt of the chat template. With a chat template,
    `prompt` + `response` are a user's and an assistant's turn; without, they are joined as plain
    text. `text` is plain text always. A tokenizer may know more tokens than the model: a row with
    one at or beyond `vocab_size` is refused. step_pattern: what ends a step; None looks for no
    steps and gives no parts. unconditional, window: of `context.py`; no parts then either. The
    other options are `ScorerConfig`'s. Raises `ValueError` where a text without its prompt cannot
    begin with anything, and where the backend cannot read the tokenizer; so does encoding where two
    backends differ.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None,
        max_model_len: int,
        vocab_size: int | None = None,
        truncate: bool = True,
        score_end_of_turn: bool = False,
        render: RenderMode = "auto",
        turns: Turns = "all",
        template_kwargs: Mapping[str, Any] | None = None,
        step_pattern: str | None = None,
        prompt_metrics: bool = False,
        unconditional: bool = False,
        window: int | None = None,
        tokenizer_backend: TokenizerBackend = "tokenizers",
    ) -> None:
        self._tokenizer = TextTokenizer(tokenizer, backend=tokenizer_backend)
        self._renderer = None
        if chat_template is not None:
            template = ChatTemplate(tokenizer, chat_template)
            self._renderer = ConversationRenderer(template, mode=render, turns=turns)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._truncate = truncate
        self._score_end_of_turn = score_end_of_turn
        self._template_kwargs = dict(template_kwargs or {})
        self._step_end = None if step_pattern is None else re.compile(step_pattern)
        self._prompt_metrics = prompt_metrics
        self._first_token = _first_token(tokenizer) if unconditional else None
        self._window = window

    def encode(self, trajectory: Trajectory) -> EncodedTrajectory:
        """Token ids and scored spans, or a refusal with its status; never raises for a bad row."""
        return self.encode_all([trajectory])[0]

    def encode_all(self, trajectories: Sequence[Trajectory]) -> list[EncodedTrajectory]:
        """Each as `encode` gives it, tokenized together: on all cores, without Python's lock."""
        rows = [self._to_read(trajectory) for trajectory in trajectories]
        return [encoded for encoded, _ in self._encoded(rows)]

    def inspect(self, trajectory: Trajectory) -> InspectedTrajectory:
        """What `encode` gives, with the text and the characters that its tokens stand for."""
        row = self._to_read(trajectory)
        ((encoded, sequences),) = self._encoded([row])
        whole, scored = "", []
        for (text, _), sequence in zip(row.texts, sequences, strict=True):
            whole += SEQUENCE_BREAK if whole else ""
            # Of a refused row nothing is scored, whatever would have been.
            if encoded.sequences and sequence.spans:
                offsets = self._tokenizer.offsets(text, add_special_tokens=not row.is_chat)
                scored += [
                    (len(whole) + offsets[start][0], len(whole) + offsets[end - 1][1])
                    for start, end in sequence.spans
                ]
            whole += text
        return InspectedTrajectory(whole, scored, encoded)

    def _encoded(
        self, rows: Sequence["_ToRead"]
    ) -> Iterator[tuple[EncodedTrajectory, list[EncodedTrajectory]]]:
        """Each row as a whole, and the sequences that its texts become."""
        tokenized = {
            is_chat: iter(self._tokenized([r for r in rows if r.is_chat is is_chat], is_chat))
            for is_chat in (True, False)
        }
        for row in rows:
            sequences = [
                self._sequence(next(tokenized[row.is_chat]), spans) for _, spans in row.texts
            ]
            encoded = row.refusal or self._joined(sequences, row.notes)
            yield self._in_context(encoded), sequences

    def _in_context(self, encoded: EncodedTrajectory) -> EncodedTrajectory:
        """The row with what the student is to read before each token that is scored."""
        if self._first_token is not None:
            return without_prompt(encoded, self._first_token)
        if self._window is not None:
            return with_window(encoded, self._window)
        if self._step_end is not None:
            return with_parts(encoded, prompt=self._prompt_metrics)
        return encoded

    def _tokenized(self, rows: Sequence["_ToRead"], is_chat: bool) -> list[TokenizedText | None]:
        texts = [text for row in rows for text, _ in row.texts]
        positions = [self._positions(text, spans) for row in rows for text, spans in row.texts]
        return self._tokenizer.tokenize(texts, positions, add_special_tokens=not is_chat)

    def _positions(self, text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Where `_sequence` must know a text's tokens.

        The ends of each span; then, of each step but a span's first one, its first character and
        the one after it.
        """
        positions = [position for span in spans for position in span]
        if self._step_end is None:
            return positions
        for start, end in spans:
            for match in self._step_end.finditer(text, start, end):
                if match.end() < end:
                    positions += [match.end(), match.end() + 1]
        return positions

    def _to_read(self, trajectory: Trajectory) -> "_ToRead":
        """The texts of a row, or none and its refusal."""
        try:
            return self._texts(trajectory)
        except NothingSaidError as error:
            refusal = EncodedTrajectory.refused(Status.NO_RESPONSE, error.detail)
        except BadMessagesError as error:
            refusal = EncodedTrajectory.refused(
                Status.BAD_MESSAGES, error.detail, reason=error.reason, hint=error.hint
            )
        return _ToRead([], refusal=refusal)

    def _texts(self, trajectory: Trajectory) -> "_ToRead":
        """The texts of a row; raises `BadMessagesError` where there are none."""
        if trajectory.contradiction:
            raise BadMessagesError(trajectory.contradiction)
        is_plain = trajectory.messages is None and trajectory.response is None
        if is_plain and trajectory.text is None:
            raise NothingSaidError("null row" if trajectory.prompt is None else "empty response")
        prompt, response = trajectory.prompt or "", trajectory.response or ""
        if is_plain:
            prompt, response = "", trajectory.text or ""
        elif trajectory.messages is None and not response:
            raise NothingSaidError("empty response")
        elif self._renderer is not None:
            return self._rendered(trajectory, self._renderer)
        if trajectory.messages is not None or not (
            isinstance(prompt, str) and isinstance(response, str)
        ):
            raise BadMessagesError(
                "this student has no chat template", hint="try --chat-template FILE"
            )
        span = (len(prompt), len(prompt) + len(response))
        return _ToRead([(prompt + response, [span])])

    def _rendered(self, trajectory: Trajectory, renderer: ConversationRenderer) -> "_ToRead":
        rendered = renderer.render(to_conversation(trajectory, self._template_kwargs))
        texts = [
            (
                made.text,
                [
                    (span.start, span.end_of_turn if self._score_end_of_turn else span.end)
                    for span in made.spans
                ],
            )
            for made in rendered.texts
        ]
        return _ToRead(texts, is_chat=True, notes=rendered.notes)

    def _sequence(
        self, tokenized: TokenizedText | None, char_spans: list[tuple[int, int]]
    ) -> EncodedTrajectory:
        """A text's tokens with their spans, or why it cannot be one of the row's sequences.

        A token is scored where its first character lies in a response. A token that begins in the
        header and ends in the response is context: the student had to emit its beginning before
        the response began.
        """
        if tokenized is None:
            return EncodedTrajectory.refused(Status.BAD_MESSAGES, "not valid Unicode")
        borders = iter(tokenized.borders)
        spans = [(max(1, next(borders)), next(borders)) for _ in char_spans]
        spans = [(first, last) for first, last in spans if first < last]
        if not spans:
            return EncodedTrajectory.refused(Status.NO_RESPONSE, "no token to score")
        step_starts = [first for first, _ in spans]
        for here, after in zip(borders, borders, strict=True):
            # Of "3. So" most tokenizers make " So" a token: no token begins with the "S".
            step_starts.append(here if here < after else here - 1)
        encoded = EncodedTrajectory(tokenized.token_ids, spans, step_starts=tuple(step_starts))
        return self._fit(encoded)

    def _fit(self, encoded: EncodedTrajectory) -> EncodedTrajectory:
        """Hold a sequence to the student's vocabulary and to `max_model_len`."""
        largest = max(encoded.token_ids)
        if self._vocab_size is not None and largest >= self._vocab_size:
            # vLLM would refuse all requests beside it.
            return EncodedTrajectory.refused(
                Status.BAD_MESSAGES,
                f"token {largest} is beyond the student's vocabulary of {self._vocab_size}",
                reason="a token is beyond the student's vocabulary",
            )
        num_tokens, limit = len(encoded.token_ids), self._max_model_len
        if num_tokens <= limit:
            return encoded
        spans = encoded.spans_within(0, limit)
        if not self._truncate:
            return EncodedTrajectory.refused(
                Status.TOO_LONG,
                f"{num_tokens} tokens, the limit is {limit}",
                reason=f"longer than {limit} tokens",
                hint="try --on-long truncate, or a higher --max-model-len",
                num_cut=num_tokens,
            )
        if not spans:
            return EncodedTrajectory.refused(
                Status.TOO_LONG,
                f"no response within the first {limit} of {num_tokens} tokens",
                reason=f"no response within the first {limit} tokens",
                hint="try a higher --max-model-len",
                num_cut=num_tokens,
            )
        return replace(
            encoded,
            token_ids=encoded.token_ids[:limit],
            spans=spans,
            status=Status.TRUNCATED,
            num_cut=num_tokens - limit,
        )

    def _joined(
        self, sequences: list[EncodedTrajectory], notes: tuple[str, ...]
    ) -> EncodedTrajectory:
        """One trajectory of its sequences, in order; those without a token to score are left out.

        Histories grow, so that what is too long comes last, as in a conversation that is cut off.
        """
        usable = [s for s in sequences if s.token_ids]
        too_long = [s for s in sequences if s.status is Status.TOO_LONG]
        unreadable = [s for s in sequences if s.status is Status.BAD_MESSAGES]
        if unreadable:
            return unreadable[0]
        num_cut = sum(s.num_cut for s in sequences)
        if not usable or (too_long and not self._truncate):
            return replace((too_long or sequences)[0], num_cut=num_cut)
        is_cut = bool(too_long) or any(s.status is Status.TRUNCATED for s in usable)
        first, *others = usable
        return replace(
            first,
            status=Status.TRUNCATED if is_cut else Status.OK,
            notes=notes,
            num_cut=num_cut,
            more=tuple(others),
        )
