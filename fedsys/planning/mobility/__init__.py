"""Where devices are: scripted moves, random waypoints, and vehicles of SUMO.

`sources.source_of` makes of a configuration the `fedsys.planning.moves.MobilitySource` that a run
follows. Scripted moves are told in shares of a round (`scripted`). Otherwise devices have positions
over time (`waypoint`, or `fcd` and `tracks` from a file), are at the nearest edge server in reach
(`coverage`), and `positions` says which moves of a round that makes.
"""
