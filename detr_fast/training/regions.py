"""torch.compile by regions: the parts that repeat and hold many small operations, each compiled once for all sizes.

Compiled are the encoder's and the decoder's layers and the box head. The backbone is not: its convolutions
are fused already (`detr_fast.ops.folded_conv`), and nothing of it is left for the compiler.
"""

from collections.abc import Callable

import torch
from torch import nn

from detr_fast.layers import MLP
from detr_fast.models.transformer import TransformerDecoderLayer, TransformerEncoderLayer

REGIONS = (TransformerEncoderLayer, TransformerDecoderLayer, MLP)


def compile_regions(model: nn.Module, say: Callable[[str], None], *, backend: str = "inductor") -> list[str]:
    """Compiles a model's regions in place; names, state dict and results stay (up to rounding).

    Sizes are dynamic: another batch or image size compiles nothing anew. Compilation happens in the first steps. Where
    the backend cannot compile, that region runs as it is and one line says so. Where a region is compiled again and
    again for another reason, torch gives up with a warning of its own.

    Args:
        model: any; regions are found by their class.
        say: takes a line for the user.
        backend: a name that `torch.compile` knows.

    Returns:
        The regions' names.

    Raises:
        ValueError: the model has no region; it would silently not be compiled.
    """
    regions = {name: module for name, module in model.named_modules() if type(module) in REGIONS}
    if not regions:
        raise ValueError(
            f"nothing to compile: {type(model).__name__} has none of {', '.join(r.__name__ for r in REGIONS)}"
        )
    chosen = _FallBack(backend, say)
    for region in regions.values():
        region.compile(dynamic=True, backend=chosen)
    return list(regions)


class _FallBack:
    """A backend that runs the graph as it is, and says so once, where `backend` cannot compile it."""

    def __init__(self, backend: str, say: Callable[[str], None]):
        self.backend, self.say, self.told = backend, say, False

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        try:
            return torch._dynamo.lookup_backend(self.backend)(graph, inputs)
        except torch._dynamo.exc.RestartAnalysis:  # no failure: the trace is asked for again, with other assumptions
            raise
        except Exception as error:  # whatever a compiler raises
            if not self.told:
                self.told = True
                reason = str(error).strip().split("\n")[0]
                self.say(f"--compile: {self.backend} failed, running uncompiled: {type(error).__name__}: {reason}")
            return graph.forward
