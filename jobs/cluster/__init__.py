"""Many workers on one job: who scores which unit, and what happens when one of them is lost.

session.py     join a Ray cluster or start one here; how many workers fit, and what each asks
worker.py      the Ray actor: one student, three steps of a unit that overlap
answers.py     what a worker answers; plain data
pool.py        the workers as Ray sees them: start, send, kill, wait
work.py        what is left to do: long units first, suspects alone, halving; plain data
deadlines.py   how long a unit may take; plain arithmetic
dispatcher.py  the loop between work and pool; knows neither Ray nor the terminal
ray_metrics.py the same events as Ray metrics
options.py     what a user says of the cluster
venue.py       student and cluster of a run, opened when they are needed
run.py         one run from a loaded plan to its last shard
"""
