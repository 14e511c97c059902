"""Trajectories to token ids and the spans of them that are scored.

The scored tokens follow the paper's code (`rsr_cal.py`): in every assistant turn, what stands
after the turn's header up to, not including, the end-of-turn token: what the student itself
would have to generate. Where a response stands in the text is `template.py`'s to find.

Knows tokenizers; knows nothing of models, scores or files.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rsr.engine.errors import first_line
from rsr.engine.template import BadMessagesError, ChatTemplate, require_encodable
from rsr.engine.trajectory import EncodedTrajectory, Status, Trajectory


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
        raise ValueError(
            f"the tokenizer of {model!r} is a {type(tokenizer).__name__}, which cannot tell where "
            "its tokens stand in the text; expected one with a tokenizer.json"
        )
    return tokenizer


class TrajectoryEncoder:
    """Turns trajectories into what the student reads, one at a time; holds no state between.

    With a chat template, `prompt` + `response` are a user's and an assistant's turn; without,
    they are joined as plain text. `text` is plain text always. A tokenizer may know more tokens
    than the model: a row with one at or beyond `vocab_size` is refused.
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
    ) -> None:
        self._tokenizer = _untrimmed_backend(tokenizer)
        self._template = None if chat_template is None else ChatTemplate(tokenizer, chat_template)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._truncate = truncate
        self._score_end_of_turn = score_end_of_turn

    def encode(self, trajectory: Trajectory) -> EncodedTrajectory:
        """Token ids and scored spans, or a refusal with its status; never raises for a bad row."""
        try:
            return self._fit(self._encode(trajectory))
        except BadMessagesError as error:
            return EncodedTrajectory.refused(Status.BAD_MESSAGES, str(error))

    def _encode(self, trajectory: Trajectory) -> EncodedTrajectory:
        if trajectory.messages is not None:
            return self._encode_chat(trajectory.messages)
        if trajectory.response is not None:
            if not trajectory.response:
                return EncodedTrajectory.refused(Status.NO_RESPONSE, "empty response")
            prompt = trajectory.prompt or ""
            if self._template is not None:
                turns = [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": trajectory.response},
                ]
                return self._encode_chat(turns)
            return self._encode_text(prompt, trajectory.response)
        if trajectory.text is not None:
            return self._encode_text("", trajectory.text)
        return EncodedTrajectory.refused(Status.NO_RESPONSE, "null row")

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> EncodedTrajectory:
        if self._template is None:
            raise BadMessagesError("this student has no chat template")
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise BadMessagesError(f"messages is {type(messages).__name__}, not a list")
        if not any(m.get("role") == "assistant" for m in messages if isinstance(m, Mapping)):
            return EncodedTrajectory.refused(Status.NO_RESPONSE, "no assistant turn")
        rendered, char_spans = self._template.render(messages)
        # Contents were looked at one by one; a template may print other fields too.
        require_encodable(rendered)
        encoding = self._tokenizer.encode(rendered, add_special_tokens=False)
        ends = (s.end_of_turn if self._score_end_of_turn else s.end for s in char_spans)
        return self._with_spans(
            encoding, [(s.start, end) for s, end in zip(char_spans, ends, strict=True)]
        )

    def _encode_text(self, context: str, scored: str) -> EncodedTrajectory:
        text = context + scored
        require_encodable(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=True)
        return self._with_spans(encoding, [(len(context), len(text))])

    @staticmethod
    def _with_spans(encoding: Any, char_spans: list[tuple[int, int]]) -> EncodedTrajectory:
        """A token is scored where its first character lies in a response.

        A token that begins in the header and ends in the response is context: the student had
        to emit its beginning before the response began.
        """
        starts = np.fromiter((o[0] for o in encoding.offsets), np.int64, len(encoding.offsets))
        # What the post-processor added (BOS) has no place in the text, though it claims (0, 0).
        is_text = ~np.asarray(encoding.special_tokens_mask, dtype=bool)
        scored = np.zeros(len(starts), dtype=bool)
        for start, end in char_spans:
            scored |= (starts >= start) & (starts < end) & is_text
        scored[:1] = False
        spans = _runs(scored)
        if not spans:
            return EncodedTrajectory.refused(Status.NO_RESPONSE, "no token to score")
        return EncodedTrajectory(token_ids=list(encoding.ids), spans=spans)

    def _fit(self, encoded: EncodedTrajectory) -> EncodedTrajectory:
        """Hold a sequence to the student's vocabulary and to `max_model_len`."""
        largest = max(encoded.token_ids, default=0)
        if self._vocab_size is not None and largest >= self._vocab_size:
            # vLLM would refuse all requests beside it.
            raise BadMessagesError(
                f"token {largest} is beyond the student's vocabulary of {self._vocab_size}"
            )
        num_tokens, limit = len(encoded.token_ids), self._max_model_len
        if num_tokens <= limit:
            return encoded
        spans = encoded.spans_within(0, limit)
        if not self._truncate:
            return EncodedTrajectory.refused(
                Status.TOO_LONG, f"{num_tokens} tokens, the limit is {limit}"
            )
        if not spans:
            return EncodedTrajectory.refused(
                Status.TOO_LONG, f"no response within the first {limit} of {num_tokens} tokens"
            )
        return EncodedTrajectory(encoded.token_ids[:limit], spans, Status.TRUNCATED)


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


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Half-open [start, end) ranges of the True runs of a (T,) boolean array."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
