"""What the kernels of a training step are for, told from their names and their order.

This project's own kernels are known by the file they are written in, so that one more kernel in a file has its kind
already. Of libraries there are names to go by, and on a CPU the operators of PyTorch stand in the place of kernels.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from ..kernels import Launch


class Kind(Enum):
    """A class of work in a step; the value is what it is called."""

    MATMUL = "matrix products"
    ATTENTION_FORWARD = "attention forward"
    ATTENTION_BACKWARD = "attention backward"
    NORM_FORWARD = "layer norm forward"
    NORM_BACKWARD = "layer norm backward"
    ACTIVATION_FORWARD = "activation forward"
    ACTIVATION_BACKWARD = "activation backward"
    EMBEDDING = "embedding"
    LOSS = "MLM loss"
    MASKING = "masking"
    OPTIMIZER = "optimizer"
    COPY = "copies and fills"
    OTHER = "other"
    IDLE = "idle"


# Of each file in kernels/: the kinds of its kernels, of those without and those with "backward" in their names.
_FILES = {
    "adamw": (Kind.OPTIMIZER, Kind.OPTIMIZER),
    "attention_hopper_blocks": (Kind.ATTENTION_BACKWARD, Kind.ATTENTION_BACKWARD),
    "attention_hopper_steps": (Kind.ATTENTION_BACKWARD, Kind.ATTENTION_BACKWARD),
    "attention_hopper_tile_backward": (Kind.ATTENTION_BACKWARD, Kind.ATTENTION_BACKWARD),
    "attention_hopper_tile_forward": (Kind.ATTENTION_FORWARD, Kind.ATTENTION_FORWARD),
    "attention_kernels": (Kind.ATTENTION_FORWARD, Kind.ATTENTION_BACKWARD),
    "column_sums": (Kind.MATMUL, Kind.MATMUL),
    "embed_kernels": (Kind.EMBEDDING, Kind.EMBEDDING),
    "geglu_product": (Kind.MATMUL, Kind.MATMUL),
    "gelu": (Kind.ACTIVATION_FORWARD, Kind.ACTIVATION_BACKWARD),
    "layer_norm": (Kind.NORM_FORWARD, Kind.NORM_BACKWARD),
    "mask_tokens": (Kind.MASKING, Kind.MASKING),
    "mlm_loss_fused": (Kind.LOSS, Kind.LOSS),
    "mlm_loss_kernels": (Kind.LOSS, Kind.LOSS),
    "mlm_loss_logits": (Kind.LOSS, Kind.LOSS),
    "mlm_loss_product": (Kind.MATMUL, Kind.MATMUL),
    "muon": (Kind.OPTIMIZER, Kind.OPTIMIZER),
    "orthogonalise": (Kind.OPTIMIZER, Kind.OPTIMIZER),
    "packing": (Kind.ATTENTION_FORWARD, Kind.ATTENTION_BACKWARD),
    "rotary": (Kind.ATTENTION_FORWARD, Kind.ATTENTION_BACKWARD),
    "select_rows": (Kind.COPY, Kind.COPY),
    "sequences": (Kind.ATTENTION_FORWARD, Kind.ATTENTION_BACKWARD),
}


@dataclass(frozen=True)
class Neighbour:
    """`kernel` is of `kind` where the last of this project's kernels to run before it has the name `before`."""

    kernel: str
    kind: Kind
    before: str


# Kernels that two files launch. The embedding's gradient is what `_join_kernel` finishes.
NEIGHBOURS = (Neighbour("_sum_shares_kernel", Kind.EMBEDDING, before="_join_kernel"),)
_ELSEWHERE = {"_sum_shares_kernel": Kind.NORM_BACKWARD}

# The first that is found in a name decides: attention and the norm of the gradient are named for products and sums too.
_LIBRARIES = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        (r"(flash|sdpa|attention).*(bwd|backward|bprop)|fmha_cutlassB", Kind.ATTENTION_BACKWARD),
        (r"flash|fmha|sdpa|attention", Kind.ATTENTION_FORWARD),
        (r"nvjet|gemm|gemv|cutlass|cublas|splitk|xmma|\b(add|b|badd)?(mm|mv|bmm)\b|aten::linear$", Kind.MATMUL),
        (r"layer_?norm.*(backward|grad)|GammaBetaBackward", Kind.NORM_BACKWARD),
        (r"layer_?norm|RowwiseMoments", Kind.NORM_FORWARD),
        (r"gelu_?backward", Kind.ACTIVATION_BACKWARD),
        (r"gelu", Kind.ACTIVATION_FORWARD),
        # Nothing but the gradient of the embedding sorts on a GPU.
        (r"radixsort|embedding", Kind.EMBEDDING),
        (r"softmax|nll_loss|cross_entropy", Kind.LOSS),
        (r"NormTwoOps|vector_norm", Kind.OPTIMIZER),
        (r"memcpy|memset|copy|fill|zero_|index|gather|scatter|CatArray|aten::(cat|clone)", Kind.COPY),
    )
)


def own_kernels(launches: Iterable[Launch]) -> dict[str, Kind]:
    """Kinds by name of this project's kernels; where NEIGHBOURS has the name, what it is elsewhere. "other": a file
    that is not known, or a name that files share and NEIGHBOURS does not tell apart."""
    kinds: dict[str, Kind] = {}
    for launch in launches:
        name, file = launch.kernel.__name__, launch.kernel.fn.__module__.rpartition(".")[2]
        kind = _ELSEWHERE.get(name) or _FILES.get(file, (Kind.OTHER,) * 2)["backward" in name]
        kinds[name] = kind if kinds.get(name, kind) is kind else Kind.OTHER
    return kinds


def classify(names: Sequence[str], own: dict[str, Kind]) -> list[Kind]:
    """The kind of each kernel of a stream, by name in the order in which they ran. own: as `own_kernels` gives it."""
    kinds, before = [], None
    for name in names:
        if name not in own:
            kinds.append(_of_library(name))
            continue
        rules = (rule.kind for rule in NEIGHBOURS if (rule.kernel, rule.before) == (name, before))
        kinds.append(next(rules, own[name]))
        before = name
    return kinds


def _of_library(name: str) -> Kind:
    return next((kind for pattern, kind in _LIBRARIES if pattern.search(name)), Kind.OTHER)
