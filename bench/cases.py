"""What is measured: operators at a size, their inputs, and the bytes and FLOPs of their definitions.

T tokens, C hidden size, I intermediate size, V vocabulary, P positions. A work is named
`<operator>/<direction>/<case>`, for example `layer_norm/fwd+bwd/65536x768`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

FORWARD = "fwd"
BOTH = "fwd+bwd"
DIRECTIONS = (FORWARD, BOTH)

# Input sets, their outputs and gradients, a second result to compare with: measuring takes some six times the memory
# that forward and backward read and write. The rest of the card is left to others.
_MEMORY_PER_BYTE = 6
_SHARE_OF_FREE_MEMORY = 0.8
_LEAST_TOKENS = 256


@dataclass(frozen=True)
class Sizes:
    """The sizes that cases are built from."""

    device: torch.device
    dtype: torch.dtype
    tokens: int = 65_536
    hidden: int = 768
    intermediate: int = 1536
    vocabulary: int = 32_768
    positions: int = 128

    def normal(self, seed: int) -> Callable[..., torch.Tensor]:
        """A source of standard normal tensors, called with their shape. Zeros would run faster than real data."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

        return draw

    def tensor_bytes(self, *shape: int) -> int:
        """Bytes of an activation of this shape."""
        return torch.Size(shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """One call's arguments by name, and the gradients that arrive at its outputs."""

    tensors: dict[str, torch.Tensor]
    grad_outputs: tuple[torch.Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self.grad_outputs))


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    `make(seed)` gives the inputs; floating-point ones are differentiated. `ours`, `eager` (plain PyTorch) and
    `reference` (run in fp64) take them by name and return a tensor or a tuple. `rows` names the inputs whose first
    dimension is tokens; the others are parameters. Where a row's result depends on other rows, `parts(inputs)` cuts the
    inputs into (rows, inputs of these rows) that do not depend on each other. `bytes` and `flops` by direction come
    from the definition: tensors of a token dimension are read or written once each; parameters and statistics are small
    and left out. `part_of`: the operator of `cramfast.kernels` that decides what runs, where the case is none itself.
    `scratch_bytes`: what a peer or the reference holds on top of that. `exact`: all results are integers,
    and have to be the reference's; where chance has a part in them, those of `eager` need not.
    """

    operator: str
    name: str
    dtype: torch.dtype
    make: Callable[[int], Inputs]
    eager: Callable
    ours: Callable | None = None
    reference: Callable | None = None
    rows: tuple[str, ...] = ()
    parts: Callable[[Inputs], Iterable[tuple[slice, Inputs]]] | None = None
    bytes: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    part_of: str | None = None
    handed_over: str | None = None
    scratch_bytes: int = 0
    exact: bool = False

    def work(self, direction: str) -> str:
        return f"{self.operator}/{direction}/{self.name}"


def fit(factory: Callable[[Sizes], Case], sizes: Sizes, free_bytes: int) -> tuple[Case, Sizes]:
    """The case at `sizes`, its tokens halved until measuring it fits into `free_bytes`; and the sizes it got."""
    while True:
        case = factory(sizes)
        need = _MEMORY_PER_BYTE * max(case.bytes.values(), default=0) + case.scratch_bytes
        if need <= _SHARE_OF_FREE_MEMORY * free_bytes or sizes.tokens <= _LEAST_TOKENS:
            return case, sizes
        sizes = replace(sizes, tokens=sizes.tokens // 2)
