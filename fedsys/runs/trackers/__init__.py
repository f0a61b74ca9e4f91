"""Trackers that people use, each behind the three methods of `fedsys.runs.tracking.Tracker`.

A package of a tracker is imported when it is chosen.
"""
