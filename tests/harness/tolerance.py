"""How near is near enough, in one place.

fp32 results are held to a share of the size of what they approximate; in lower precision the yardstick is the error
that the dense model itself makes in that dtype, both against fp32.
"""

from collections.abc import Sequence

from torch import Tensor

FP32 = 1e-4  # share of the largest output norm since the refresh
ROUNDING = 1e-6  # added where the yardstick itself may be zero


def distance(got: Tensor, want: Tensor) -> float:
    """Euclidean norm of the difference, computed in fp64."""
    return (got.double() - want.double()).norm().item()


def relative(got: Tensor, want: Tensor) -> float:
    """Distance as a share of the norm of `want`."""
    return distance(got, want) / want.double().norm().item()


def assert_near(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """Step by step, the distance is at most `FP32` of the largest norm that `want` has had so far."""
    largest = 0.0
    for step, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        largest = max(largest, theirs.double().norm().item())
        error = distance(ours, theirs)
        assert error <= FP32 * largest, f"step {step}: off by {error / largest:.2e} of the norm, {FP32:.0e} is allowed"


def assert_within_twice(got: Sequence[Tensor], dense: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """No step is further from `exact` (fp32) than twice what `dense`, in the dtype of `got`, is at its worst step."""
    yardstick = max(relative(ours, theirs) for ours, theirs in zip(dense, exact, strict=True))
    for step, (ours, theirs) in enumerate(zip(got, exact, strict=True)):
        error = relative(ours, theirs)
        assert error <= 2 * yardstick + ROUNDING, (
            f"step {step}: error {error:.2e}, the dense model's is {yardstick:.2e}"
        )
