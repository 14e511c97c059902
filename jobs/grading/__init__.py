"""Grading: whether each row's answer is the problem's.

grades.py     the words of a grade: statuses, and what each says
columns.py    the columns that a run adds
answers.py    which text of a row is its answer
verifiers.py  what compares an answer with the gold: math, exact, mcq, a user's own
child.py      the process that runs a verifier, and may be killed
children.py   those processes as their parent sees them
commit.py     a graded shard, put together
grade.py      the run: what is left to do, done by as many processes as there are cores
rates.py      solve rate and pass rates of what was written
verify.py     what a graded file must hold
"""
