"""What is recognised in a graph: one file an algebraic idea. To add one, write its file and a line in `ALL`."""

from chipmunk_fx.patterns.attention import ATTENTION
from chipmunk_fx.patterns.convolutions import CONVOLVED
from chipmunk_fx.patterns.mlp import GATED_MLP, MLP
from chipmunk_fx.patterns.parallel import PARALLEL_GATED_MLP, PARALLEL_MLP
from chipmunk_fx.patterns.softmax import SOFTMAX

ALL = (ATTENTION, SOFTMAX, MLP, GATED_MLP, PARALLEL_MLP, PARALLEL_GATED_MLP, CONVOLVED)

__all__ = ["ALL"]
