"""Parquet in, Parquet out: files of trajectories, and the columns that a run adds to them.

inputs.py         which files stand behind INPUT
json_input.py     JSON files as Parquet
parquet.py        opening files, reading footers
columns.py        which columns hold trajectories
shard.py          a file as a shard, cut into units
reader.py         a unit's rows as trajectories
score_columns.py  the columns that scoring adds
writer.py         a finished shard
scored.py         finished shards, opened to ask questions of them
"""
