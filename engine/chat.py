"""Trajectories to token ids and the spans of them that are scored.

The scored tokens follow the paper's code (`rsr_cal.py`): in every assistant turn, what stands
after the turn's header up to, not including, the end-of-turn token: what the student itself
would have to generate. Where a response stands in the text is `layout.py`'s to find.

Knows tokenizers; knows nothing of models, scores or files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.mistral import convert_tekken_tokenizer, resolve_mistral_format

from rsr.engine.config import RenderMode, Turns
from rsr.engine.errors import first_line
from rsr.engine.messages import BadMessagesError, to_conversation
from rsr.engine.rendering import ConversationRenderer, NothingSaidError
from rsr.engine.template import ChatTemplate
from rsr.engine.trajectory import (
    SEQUENCE_BREAK,
    EncodedTrajectory,
    InspectedTrajectory,
    Status,
    Trajectory,
)


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


@dataclass(frozen=True, slots=True)
class _ToRead:
    """A row's texts with their scored characters, and how they came about.

    is_chat: a template made them, special tokens and all.
    """

    texts: list[tuple[str, list[tuple[int, int]]]]
    is_chat: bool
    notes: tuple[str, ...]


class TrajectoryEncoder:
    """Turns trajectories into what the student reads, one at a time.

    Holds no state between but what it has learnt of the chat template. With a chat template,
    `prompt` + `response` are a user's and an assistant's turn; without, they are joined as plain
    text. `text` is plain text always. A tokenizer may know more tokens than the model: a row with
    one at or beyond `vocab_size` is refused. The other options are `ScorerConfig`'s.
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
    ) -> None:
        self._tokenizer = _untrimmed_backend(tokenizer)
        self._renderer = None
        if chat_template is not None:
            template = ChatTemplate(tokenizer, chat_template)
            self._renderer = ConversationRenderer(template, mode=render, turns=turns)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._truncate = truncate
        self._score_end_of_turn = score_end_of_turn
        self._template_kwargs = dict(template_kwargs or {})

    def encode(self, trajectory: Trajectory) -> EncodedTrajectory:
        """Token ids and scored spans, or a refusal with its status; never raises for a bad row."""
        return self._encode(trajectory)[1]

    def inspect(self, trajectory: Trajectory) -> InspectedTrajectory:
        """What `encode` gives, with the text and the characters that its tokens stand for."""
        texts, encoded = self._encode(trajectory)
        whole, scored = "", []
        for number, text in enumerate(texts):
            whole += SEQUENCE_BREAK if number else ""
            for sequence in encoded.sequences[number : number + 1]:
                # Sequences that do not fit are the last ones.
                is_chat = trajectory.text is None and self._renderer is not None
                encoding = self._tokenizer.encode(text, add_special_tokens=not is_chat)
                scored += [
                    (len(whole) + encoding.offsets[a][0], len(whole) + encoding.offsets[b - 1][1])
                    for a, b in sequence.spans
                ]
            whole += text
        return InspectedTrajectory(whole, scored, encoded)

    def _encode(self, trajectory: Trajectory) -> tuple[list[str], EncodedTrajectory]:
        """The texts that the student reads, and what they become."""
        texts: list[str] = []
        try:
            to_read = self._to_read(trajectory)
            sequences = []
            for text, spans in to_read.texts:
                texts.append(text)
                encoded = self._tokenized(text, spans, add_special_tokens=not to_read.is_chat)
                sequences.append(self._fit(encoded) if encoded.token_ids else encoded)
            return texts, _joined(sequences, to_read.notes)
        except NothingSaidError as error:
            return texts, EncodedTrajectory.refused(Status.NO_RESPONSE, error.detail)
        except BadMessagesError as error:
            return texts, EncodedTrajectory.refused(
                Status.BAD_MESSAGES, error.detail, reason=error.reason, hint=error.hint
            )

    def _to_read(self, trajectory: Trajectory) -> "_ToRead":
        """The texts of a row; raises `BadMessagesError` where there are none."""
        is_plain = trajectory.messages is None and trajectory.response is None
        if is_plain and trajectory.text is None:
            raise NothingSaidError("null row")
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
        return _ToRead([(prompt + response, [span])], is_chat=False, notes=())

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

    def _tokenized(
        self, text: str, char_spans: list[tuple[int, int]], *, add_special_tokens: bool
    ) -> EncodedTrajectory:
        """A token is scored where its first character lies in a response.

        A token that begins in the header and ends in the response is context: the student had
        to emit its beginning before the response began.
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            # A lone surrogate: no text, says the tokenizer.
            raise BadMessagesError("not valid Unicode") from error
        spans = []
        for start, end in char_spans:
            first = max(1, _first_token_from(encoding, start, len(text)))
            last = _first_token_from(encoding, end, len(text))
            if first < last:
                spans.append((first, last))
        if not spans:
            return EncodedTrajectory.refused(Status.NO_RESPONSE, "no token to score")
        return EncodedTrajectory(token_ids=list(encoding.ids), spans=spans)

    def _fit(self, encoded: EncodedTrajectory) -> EncodedTrajectory:
        """Hold a sequence to the student's vocabulary and to `max_model_len`."""
        largest = max(encoded.token_ids)
        if self._vocab_size is not None and largest >= self._vocab_size:
            # vLLM would refuse all requests beside it.
            raise BadMessagesError(
                "a token is beyond the student's vocabulary",
                detail=f"token {largest} is beyond the student's vocabulary of {self._vocab_size}",
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
            )
        if not spans:
            return EncodedTrajectory.refused(
                Status.TOO_LONG,
                f"no response within the first {limit} of {num_tokens} tokens",
                reason=f"no response within the first {limit} tokens",
                hint="try a higher --max-model-len",
            )
        return EncodedTrajectory(encoded.token_ids[:limit], spans, Status.TRUNCATED)


def _joined(sequences: list[EncodedTrajectory], notes: tuple[str, ...]) -> EncodedTrajectory:
    """One trajectory of its sequences, in order; those without a token to score are left out.

    Histories grow, so that what is too long comes last, as in a conversation that is cut off.
    """
    usable = [s for s in sequences if s.token_ids]
    too_long = [s for s in sequences if s.status is Status.TOO_LONG]
    if not usable or (too_long and any("limit is" in s.detail for s in too_long)):
        return (too_long or sequences)[0]
    is_cut = bool(too_long) or any(s.status is Status.TRUNCATED for s in usable)
    first, *others = usable
    return replace(
        first,
        status=Status.TRUNCATED if is_cut else Status.OK,
        notes=notes,
        more=tuple(others),
    )


def _untrimmed_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy whose offsets tile the text.

    Byte-level tokenizers as shipped trim white space off their offsets, which moves a header's
    final newline into the response.
    """

    def untrimmed(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: False if k == "trim_offsets" else untrimmed(v) for k, v in node.items()}
        return [untrimmed(v) for v in node] if isinstance(node, list) else node

    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    # The vocabulary is by far the largest part, and has no offsets in it.
    for part in ("pre_tokenizer", "post_processor"):
        settings[part] = untrimmed(settings.get(part))
    backend = Tokenizer.from_str(json.dumps(settings))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _first_token_from(encoding: Encoding, position: int, num_chars: int) -> int:
    """The first token whose first character is at `position` or after; past the last if none.

    Tokens that a post-processor added (BOS) have no place in the text and are not counted.
    """
    # Not by the list of all offsets, which takes longer to make than everything else here.
    for covered in range(position, num_chars):
        token = encoding.char_to_token(covered)
        if token is not None:
            break
    else:
        token = len(encoding)
        while token and encoding.token_to_chars(token - 1) is None:
            token -= 1
        return token
    while (chars := encoding.token_to_chars(token)) is not None and chars[0] < position:
        token += 1
    return token
