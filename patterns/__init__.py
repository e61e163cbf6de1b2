"""What is recognised in a graph: one file an algebraic idea. To add one, write its file and a line in `ALL`."""

from chipmunk_fx.patterns.attention import ATTENTION
from chipmunk_fx.patterns.mlp import GATE_FIRST_MLP, GATE_LAST_MLP, GATED_MLP, MLP
from chipmunk_fx.patterns.parallel import PARALLEL_MLP
from chipmunk_fx.patterns.softmax import SOFTMAX, SOFTMAX_EINSUM

ALL = (ATTENTION, SOFTMAX, SOFTMAX_EINSUM, MLP, PARALLEL_MLP, GATED_MLP, GATE_FIRST_MLP, GATE_LAST_MLP)

__all__ = ["ALL"]
