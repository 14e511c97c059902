"""Exporting: chosen rows as the data set that a trainer reads.

formats.py   a row as messages, prompt and completion, sharegpt turns, or alpaca fields
plan.py      which rows can be exported, in which order, in which files
files.py     the files of the rows
sidecars.py  what tells trainers and people about them
export.py    the run: look, plan, write
verify.py    what an exported file must hold
"""
