"""The journey of requests through a workspace: the one room that carries them out and acts on what stages decide."""

from expunge.core.protocols import Failed, Held, Job, NotDone, Passed, Stage
from expunge.workflow.config import Config, Policy
from expunge.workflow.erasure import Leftovers
from expunge.workflow.fallback import FallBack
from expunge.workflow.journey import Journey, Progress
from expunge.workflow.mirror import Mirror
from expunge.workflow.steps import AFTER, BEFORE
from expunge.workflow.workspace import Workspace

__all__ = [
    "AFTER",
    "BEFORE",
    "Config",
    "Failed",
    "FallBack",
    "Held",
    "Job",
    "Journey",
    "Leftovers",
    "Mirror",
    "NotDone",
    "Passed",
    "Policy",
    "Progress",
    "Stage",
    "Workspace",
]
