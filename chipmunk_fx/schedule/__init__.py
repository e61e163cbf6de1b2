"""When: which generation, step and branch a call belongs to, and the phase that the schedule gives it."""

from chipmunk_fx.schedule.phase import Phase
from chipmunk_fx.schedule.policies import POLICIES, Explicit, Interval, Policy, Skipping, beyond, policy_from
from chipmunk_fx.schedule.timeline import Observation, Position, Timeline

__all__ = [
    "POLICIES",
    "Explicit",
    "Interval",
    "Observation",
    "Phase",
    "Policy",
    "Position",
    "Skipping",
    "Timeline",
    "beyond",
    "policy_from",
]
