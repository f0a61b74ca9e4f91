"""FedAdapt: an agent that learns by reinforcement how much of a model devices should keep.

Wu et al., "FedAdapt: Adaptive Offloading for IoT Devices in Federated Learning", IEEE IoT-J 9(21),
2022. An agent says one of two things (``policy.action``).

``cuts``, our form: one network scores each cut of each device. `knowing` is what is known of
devices, `informed` how that follows from measurements, `outlook` what is expected of each cut,
`cut_agent` what scores it, `cut_deciding` the loop of a run. It learns on `fleets` that are drawn,
or in `client_rounds`, by `cut_ppo`.

``shares``, the paper's: devices are gathered into groups of like speed (`grouping`), what was seen
of the groups is the state (`observing`), the action a share of the work for each group, and the
time that is saved the reward. `agent` is what says them, `deciding` the loop of a run. It learns in
an `environment` on the timeline (`scenarios`, `deck`) or of real clients, by `ppo`.

`making` returns the agent of a run, `practice` trains it.
"""
