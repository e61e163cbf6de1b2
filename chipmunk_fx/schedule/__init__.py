"""When: which generation, step and branch a call belongs to, and the phase that the schedule gives it."""

from chipmunk_fx.schedule.phase import Phase, strip
from chipmunk_fx.schedule.policies import (
    Drift,
    Explicit,
    History,
    Interval,
    Policy,
    Skipping,
    Steady,
    Whole,
    beyond,
    policy_from,
)
from chipmunk_fx.schedule.run import Observation
from chipmunk_fx.schedule.timeline import Position, Timeline

__all__ = [
    "Drift",
    "Explicit",
    "History",
    "Interval",
    "Observation",
    "Phase",
    "Policy",
    "Position",
    "Skipping",
    "Steady",
    "Timeline",
    "Whole",
    "beyond",
    "policy_from",
    "strip",
]
