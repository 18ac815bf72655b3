"""The race: one generator and one model, through every way of feeding that there is here.

track.race ── starts anew, one at a time ──► lane.py, a process of its own:
    │                                          a Contestant's loop over a Row's batches, timed
    ▼                                          by a Lap
table.Results ──► text, JSON, picture.py
"""
