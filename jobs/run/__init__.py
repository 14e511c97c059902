"""What a run is, keeps and says, whatever it does to its rows.

folder.py     OUTPUT: where everything stands, and what makes it safe to stop and start again
receipts.py   what vouches for a written file
preflight.py  what must hold before anything is written
events.py     what happened, as data
progress.py   what a terminal shows meanwhile; forecast.py: how far it is within a unit
status.py     how far a run is
verify.py     whether all of it is there, and right
"""
