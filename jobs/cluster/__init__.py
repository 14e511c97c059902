"""Many workers on one job: who runs which unit, and what happens when one of them is lost.

session.py     join a Ray cluster or start one here; how many workers fit, and what each asks
vitals.py      whether the Ray that a run works on is still there
token.py       whether the cluster that is joined gets to see Ray's token
job.py         what a run does to its units: an interface, which scoring implements
worker.py      the Ray actor: one open job, three steps of a unit that overlap
answers.py     what a worker answers; plain data
pool.py        the workers as Ray sees them: start, send, kill, wait
work.py        what is left to do: long units first, suspects alone, halving; plain data
deadlines.py   how long a unit may take; plain arithmetic
dispatcher.py  the loop between work and pool; knows neither Ray nor the terminal
ray_metrics.py the same events as Ray metrics
options.py     what a user says of the cluster
venue.py       the cluster of a run, joined when it is needed
run.py         one run from a loaded plan to its last shard
address.py     the calls at an address, or none
remaining.py   what a run has left to do, and doing it
"""
