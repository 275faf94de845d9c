"""Screens that look for malicious removal requests, calibrated to a stated rate of false alarms.

What is known of the published defence is a sentence of an abstract (Qian et al., KDD 2023): it identifies effective
malicious unlearning requests, and unlearns them, by their gradient influence on the unlearned model.
`GradientInfluence` is our form of it. `Isolation` by medoids is our inference from surveys and from EPIC (Yang, Liu and
Mirzasoleiman, ICML 2022). `Membership`, `Coalition`, the calibration and the decisions are our own. No table of any
paper is reproduced.
"""

from expunge.screen.asked import Asked, understand
from expunge.screen.benign import Benign
from expunge.screen.bound import Bounds, first_order_bound, probe_bounds, smoothness, step_bound, surely_lowers
from expunge.screen.calibrate import Screening, calibrate, defend
from expunge.screen.coalition import Coalition
from expunge.screen.conformal import p_values
from expunge.screen.decide import Decision
from expunge.screen.desk import Desk, default_screens
from expunge.screen.facility import cover
from expunge.screen.influence import GradientInfluence
from expunge.screen.isolation import Isolation
from expunge.screen.membership import Membership
from expunge.screen.norm import GradientNorm
from expunge.screen.scene import Scene
from expunge.screen.sieve import Judged, Sieve
from expunge.screen.stage import ScreenStage

__all__ = [
    "Asked",
    "Benign",
    "Bounds",
    "Coalition",
    "Decision",
    "Desk",
    "GradientInfluence",
    "GradientNorm",
    "Isolation",
    "Judged",
    "Membership",
    "Scene",
    "ScreenStage",
    "Screening",
    "Sieve",
    "calibrate",
    "cover",
    "default_screens",
    "defend",
    "first_order_bound",
    "p_values",
    "probe_bounds",
    "smoothness",
    "step_bound",
    "surely_lowers",
    "understand",
]
