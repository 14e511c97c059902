"""Comparing streams: native traces of a student beside refined ones of the same problems.

streams.py    one scored stream, as sums of each of its problems
compare.py    the streams side by side, on the problems that all of them have
pairs.py      a refined trace and the native one that it was made from, token by token
drift.py      how far refined traces have moved from their native ones, without a judge
printing.py   what a terminal is told of it
page.py       the same as a section of the report
gate.py       a run that keeps a refined trace only if it is correct and has not drifted
verify.py     what a gated file must hold
"""
