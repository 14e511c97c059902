"""Refining: an oracle repairs a student's traces, or writes them anew, through a model server.

templates/    what the oracle is asked, one Jinja template for each mode
prompts.py    the templates as they are rendered
rows.py       which text of a row is its trace, and a row with another one in its place
outcome.py    what became of a row's trace, and the columns that say so
endpoint.py   the server: retries, a budget of requests, no key in any text
journal.py    answers that no unit holds yet, so that nothing is asked twice
refine.py     the run: what is left to do, asked by so many requests at a time
commit.py     a refined shard, put together
verify.py     what a refined file must hold
"""
