"""The published schedules (arXiv 2506.03275) at 50 steps, phase by phase: every setting, both formats, one and two branches.

CHIPMUNK_ACCEPT=1 writes the golden file anew: look at the difference before keeping it.
"""

import os
from collections import defaultdict
from pathlib import Path

import pytest

from chipmunk_fx.config import Config
from chipmunk_fx.schedule import History, Observation, Phase, Timeline, policy_from, strip

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.txt"
EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
STEPS = 50
SKIPS = [7, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43]
REFRESHES = {
    "flux": [0, 10, 20, 30, 40],
    "hunyuan": [0, 1, 10, 40],
    "wan": [0, 10, 20, 30, 40],
    "mochi": [0, 1, 10, 40],
}


def phases(config: Config, texts: tuple[str, ...]) -> dict[int, list[Phase]]:
    """Branch -> phase of each step, for a sampler that calls the model once a text at falling timesteps."""
    policy, timeline = policy_from(config.schedule), Timeline(STEPS, len(texts))
    found: dict[int, list[Phase]] = defaultdict(list)
    histories: dict[int, History] = defaultdict(History)
    for step in range(STEPS):
        for text in texts:
            position = timeline.advance(Observation((float(STEPS - step),), text))
            assert (position.step, position.decided) == (step, True)
            phase = policy.phase(step, histories[position.branch])
            histories[position.branch] = histories[position.branch].after(step, phase)
            found[position.branch].append(phase)
    return found


def configs(name: str, skips: list[int] | None) -> list[Config]:
    """A published setting in our format and in the original's, with or without the published list of skipped steps."""
    files = [EXAMPLES / f"{name}.yaml", EXAMPLES / f"{name}-original.yaml"]
    options = {"schedule.steps": STEPS, "schedule.skip_steps": skips}
    return [Config.from_options({"config": file, **options}, warn=lambda _: None) for file in files]


@pytest.mark.parametrize("skips", [None, SKIPS], ids=["whole", "skipping"])
@pytest.mark.parametrize("texts", [("a",), ("a", "b")], ids=["one branch", "two branches"])
@pytest.mark.parametrize("name", REFRESHES)
def test_phases_are_those_published(name: str, texts: tuple[str, ...], skips: list[int] | None):
    want = [Phase.SPARSE] * STEPS
    for step in skips or ():
        want[step] = Phase.SKIP
    for step in REFRESHES[name]:
        want[step] = Phase.REFRESH
    for config in configs(name, skips):
        assert phases(config, texts) == dict.fromkeys(range(len(texts)), want)


def test_no_published_skip_falls_on_a_refresh():
    assert len(SKIPS) == 25 and not {step for steps in REFRESHES.values() for step in steps} & set(SKIPS)


def test_tables():
    lines = [" " * 20 + "".join(f"{ten:<10d}" for ten in range(0, STEPS, 10)).rstrip()]
    for name in REFRESHES:
        for skips in (None, SKIPS):
            ours, original = (phases(config, ("a", "b")) for config in configs(name, skips))
            assert ours == original
            for branch, listed in ours.items():
                head = f"{name}{' skipping' if skips else ''}"
                lines.append(f"{head:<17}{branch}  {strip(listed)}")
    shown = "\n".join(lines) + "\n"
    if os.environ.get("CHIPMUNK_ACCEPT") == "1":
        GOLDEN.write_text(shown)
    assert shown == GOLDEN.read_text(), f"{GOLDEN.name} differs; CHIPMUNK_ACCEPT=1 accepts what is shown now"
