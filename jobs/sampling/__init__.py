"""Sampling: the student's own answers to problems.

prompts.py  a problem's row as the messages that the student answers
blocks.py   which samples of each problem a file of the output holds
columns.py  the columns that a candidate adds to its problem's
generating.py  what every job of a model that answers has in common
job.py      sampling as a job of the cluster
commit.py   a sampled shard, put together
sample.py   the run
verify.py   what a sampled file must hold
"""
