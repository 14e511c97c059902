"""What the oracle is asked, and what of its reply is the trace."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rsr.jobs.refinement.prompts import CLOSING, MODES, OPENING, load_prompt, trace_in


@given(st.text(), st.text(), st.text())
def test_trace_is_what_stands_in_the_last_whole_pair_of_tags(before, trace, after):
    assume("refined_trace>" not in before + trace + after)
    reply = f"{before}{OPENING}draft{CLOSING}{before}{OPENING}\n{trace}\n{CLOSING}{after}"
    assert trace_in(reply) == trace
    assert trace_in(f"{before}{OPENING}\n{trace}{after}") is None
    assert trace_in(f"{before}{trace}{CLOSING}{after}") is None


@pytest.mark.parametrize("mode", MODES)
def test_texts_reach_the_oracle_as_they_are(mode):
    """A text is no template, and no HTML."""
    texts = ("{{ trace }} <b>&amp;</b>", "{% raw %} 1 < 2 & \n\n", "{{ no_such_name }}")
    rendered = load_prompt(mode).render(*texts)
    assert texts[0] in rendered
    assert (texts[1] in rendered) == (mode != "from-scratch")
    assert texts[2] in rendered
    assert rendered.rstrip().endswith(CLOSING)
    assert "correct final answer" not in load_prompt(mode).render("p", "t", "")
