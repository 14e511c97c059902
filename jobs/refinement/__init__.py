"""Refining: an oracle repairs a student's traces, or writes them anew.

templates/    what the oracle is asked, one Jinja template for each mode
prompts.py    the templates as they are rendered
rows.py       which text of a row is its trace, and a row with another one in its place
questions.py  what the oracle is asked about a unit's rows
outcome.py    what became of a row's trace, and the columns that say so
replies.py    what an oracle's reply makes of a row
options.py    what a run is asked to do, has left to do, and says that it did
endpoint.py   an oracle on a server: retries, a budget of requests, no key in any text
journal.py    answers that no unit holds yet, so that nothing is asked twice
served.py     the rest of a run by a server, by so many requests at a time
job.py        the rest of a run by a model of our own, as a job of the cluster
refine.py     the run: what is left to do, and who does it
commit.py     a refined shard, put together
verify.py     what a refined file must hold
"""
