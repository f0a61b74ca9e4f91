"""Answering on after a host of a chain fails: who is lost, what can be done, what is best, doing it.

CONTINUER (Majeed et al., IEEE EDGE 2022) chooses between repartitioning, early exit and skip connection by accuracy,
latency and downtime. Detection, replay and the rest of the life of a failure are ours.
"""
