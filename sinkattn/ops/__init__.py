"""The operators ``torch.ops.sinkattn.*`` and what surrounds them. No other package names ``_C`` or ``torch.ops``.

``library`` loads the compiled part; ``checks`` checks arguments; ``backends`` chooses a backend; ``attention``,
``ring`` and ``linear`` are the operators themselves; ``memory`` allocates rings. A function whose name ends in an
underscore writes to its first arguments. The schemas (csrc/ops.cpp) say so, and fake kernels let ``torch.compile``
trace through every operator.
"""

from sinkattn.ops.attention import sink_attention_
from sinkattn.ops.backends import BACKENDS, Backend, cpu_capability, select_backend
from sinkattn.ops.checks import DTYPES, EIGHT_BIT_DTYPES, check_tensor, lacks_fp8
from sinkattn.ops.library import RingLayout, build_info
from sinkattn.ops.linear import LINEAR_DTYPES, MAX_LINEAR_TOKENS, int4_linear, linear, linear_operator
from sinkattn.ops.memory import zeros
from sinkattn.ops.ring import append_, linearise, reorder_, reset_, rollback_

__all__ = [
    "BACKENDS",
    "DTYPES",
    "EIGHT_BIT_DTYPES",
    "LINEAR_DTYPES",
    "MAX_LINEAR_TOKENS",
    "Backend",
    "RingLayout",
    "append_",
    "build_info",
    "check_tensor",
    "cpu_capability",
    "int4_linear",
    "lacks_fp8",
    "linear",
    "linear_operator",
    "linearise",
    "reorder_",
    "reset_",
    "rollback_",
    "select_backend",
    "sink_attention_",
    "zeros",
]
