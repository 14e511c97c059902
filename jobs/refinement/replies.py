"""What an oracle's reply makes of a row: the same of a server's and of a model of our own."""

from rsr.jobs.refinement.outcome import Outcome, RefineStatus
from rsr.jobs.refinement.prompts import CLOSING, OPENING, trace_in


def outcome_of_reply(
    text: str,
    native: str,
    *,
    is_cut_off: bool,
    prompt_tokens: int | None,
    completion_tokens: int | None,
) -> Outcome:
    """What becomes of the row whose trace is `native`.

    is_cut_off: the reply reached its limit of tokens; what it holds may be half a trace.
    """

    def outcome(
        status: RefineStatus, text: str | None = None, detail: str | None = None
    ) -> Outcome:
        return Outcome(status, text, detail, prompt_tokens, completion_tokens)

    if is_cut_off:
        return outcome(RefineStatus.CUT_OFF, detail="the reply reached its limit of tokens")
    trace = trace_in(text)
    if trace is None or not trace.strip():
        detail = f"the reply has no text between {OPENING} and {CLOSING}"
        return outcome(RefineStatus.NO_TRACE, detail=detail)
    if trace == native:
        return outcome(RefineStatus.UNCHANGED)
    # Lone surrogates, which JSON can carry and Parquet cannot.
    return outcome(RefineStatus.REFINED, trace.encode("utf-8", "replace").decode())
