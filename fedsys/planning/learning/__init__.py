"""FedAdapt: an agent that learns by reinforcement how much of a model devices should keep.

Wu et al., "FedAdapt: Adaptive Offloading for IoT Devices in Federated Learning", IEEE IoT-J 9(21),
2022. Devices are gathered into groups of like speed (`grouping`), what was seen of the groups is
the agent's state (`observing`), its action is a share of the work for each group, and the time
that is saved its reward. It learns in an `environment`, whose steps are played on the timeline
(`scenarios`) or carried out by real clients; `ppo` trains it, `agent` is what is left to run.
"""
