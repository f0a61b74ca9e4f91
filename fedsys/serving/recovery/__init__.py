"""Answering on after a host of a chain fails: who is lost, what can be done, and doing it.

CONTINUER (Majeed et al., IEEE EDGE 2022) chooses between repartitioning, early exit and skip
connection by accuracy, latency and downtime; detection, replay and return are ours.
"""
