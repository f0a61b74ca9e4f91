"""Differential privacy, and what leaks without it or in spite of it.

By example: `PrivateUpdate` makes the gradients of a step private, `stepping` does so for a part of
a model, and `check_record_run` and `check_record_model` refuse what cannot be promised. `epsilon`
and `noise_multiplier` account for releases, a `PrivacyLedger` holds what was spent, and a `Claim`
says what it means. At the cut: `Release` clips activations that leave a device and adds noise to
them, `cut_noise` says how much a budget asks for and `cut_epsilon` what it spends; `randomised` are
labels under randomised response. The modules ``audit_…`` are attacks: images from activations,
labels from gradients, membership from models, and lower bounds on ε, which no claim may lie below.
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "Claim",
    "Noise",
    "PrivacyLedger",
    "PrivateUpdate",
    "Release",
    "Releases",
    "check_record_model",
    "check_record_run",
    "cut_epsilon",
    "cut_noise",
    "epsilon",
    "noise_multiplier",
    "randomised",
    "stepping",
]

if TYPE_CHECKING:
    from fedsys.privacy.accountant import Releases, epsilon, noise_multiplier
    from fedsys.privacy.budget import PrivacyLedger
    from fedsys.privacy.check import check_record_model, check_record_run
    from fedsys.privacy.claim import Claim
    from fedsys.privacy.cut import cut_epsilon, cut_noise
    from fedsys.privacy.labels import randomised
    from fedsys.privacy.part import stepping
    from fedsys.privacy.release import Noise, Release
    from fedsys.privacy.update import PrivateUpdate
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "accountant": "Releases epsilon noise_multiplier",
            "budget": "PrivacyLedger",
            "check": "check_record_model check_record_run",
            "claim": "Claim",
            "cut": "cut_epsilon cut_noise",
            "labels": "randomised",
            "part": "stepping",
            "release": "Noise Release",
            "update": "PrivateUpdate",
        },
    )
