"""Differential privacy, and what leaks without it or in spite of it.

`Release` clips activations that leave a device and adds noise to them, `cut_noise` says how much a
budget asks for and `cut_epsilon` what it spends; `randomised` are labels under randomised response.
The modules ``audit_…`` are attacks: images from activations, labels from gradients, membership from
models, and lower bounds on ε, which no claim may lie below.
"""

from typing import TYPE_CHECKING

from fedsys import face

__all__ = ["Noise", "Release", "cut_epsilon", "cut_noise", "randomised"]

if TYPE_CHECKING:
    from fedsys.privacy.cut import cut_epsilon, cut_noise
    from fedsys.privacy.labels import randomised
    from fedsys.privacy.release import Noise, Release
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "cut": "cut_epsilon cut_noise",
            "labels": "randomised",
            "release": "Noise Release",
        },
    )
