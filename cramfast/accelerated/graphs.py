"""The layers of a model as CUDA graphs, for short batches whose shapes come again.

On a few thousand tokens the layers take the host several times as long to launch as the GPU to compute. A shape that
comes a second time is recorded: forward and backward pass of all layers become a graph each, which one call replays.

The graphs read and write tensors of their own. A batch is copied there, filled up to one of few numbers of tokens, and
its result copied out; so are the gradients of the parameters, which come back as new tensors for autograd to add to
what is there. All recordings share one memory for activations, so that only one batch is on its way at a time: while a
result waits for its backward pass, others are computed without graphs.

What is recorded are layers over tensors that lie where the parameters do, but are others to autograd: as long as the
result of any batch is kept, so is autograd's note of the parameters and the stream that they were used on, which is
none that is being captured.

T tokens, C hidden size, B sequences.
"""

import copy
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from ..kernels import expect_first_derivative
from ..train.graphs import Graphs
from .batch import Batch
from .encoder import Layer, fits_tapes, gelu_form
from .weights import parameters_of

# Beyond, the GPU takes longer than the host, and activations take memory for good.
_MOST_TOKENS = 4096
_MOST_SHAPES = 16
_LEAST_STEP, _STEPS = 64, 8
_LENGTHS = (64, 128, 256, 384, 512)

Compute = Callable[[list[Layer], nn.LayerNorm | None, torch.Tensor, Batch], torch.Tensor]
"""What the layers, and the norm behind the last of them, make of x (T, C) of a batch: hidden states (T, C)."""


class Shape(NamedTuple):
    """What a recording is for: `tokens`, of which up to `spare` may be filled, in `sequences` of up to `longest`."""

    tokens: int
    spare: int
    sequences: int
    longest: int

    @classmethod
    def of(cls, batch: Batch, tokens: int) -> "Shape | None":
        """The smallest that holds the batch of so many tokens; None where there is none."""
        longest = next((length for length in _LENGTHS if length >= batch.max_seqlen), None)
        if longest is None or not 0 < tokens <= _MOST_TOKENS:
            return None
        step = max(_LEAST_STEP, (1 << tokens.bit_length() - 1) // _STEPS)
        return cls(-(-tokens // step) * step, step - 1, batch.cu_seqlens.shape[0] - 1, longest)

    @property
    def fillers(self) -> int:
        """How many sequences hold what is filled, and one more: nobody may take all sequences for full ones."""
        return -(-self.spare // self.longest) + 1


@dataclass(eq=False)
class _Turn:
    """One batch's way through the graphs, over parameters as they were; done: its backward pass was there."""

    versions: int
    done: bool = False


class Replays:
    """Runs the layers of one model, as graphs where a shape comes again."""

    def __init__(self, device: torch.device):
        self.device, self.graphs = device, Graphs(device)
        self.gradients: list[torch.Tensor] = []
        self.latest: Callable[[], _Turn | None] = lambda: None
        self._facts: tuple | None = None
        self._place: int | None = None
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._stream: int | None = None

    def __reduce__(self):
        """A copy of a model records for itself, perhaps elsewhere: it has None."""
        return type(None), ()

    def run(
        self, compute: Compute, layers: list[Layer], final_norm: nn.LayerNorm | None, x: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """What `compute` gives."""
        if self._recorded and self._is_free() and _lies_at(layers) != self._place:
            self._forget()  # for whoever moves a model and trains it no more
        shape = Shape.of(batch, x.shape[0]) if self._can(layers, x, batch) else None
        parameters = _parameters(layers, final_norm) if shape is not None else None
        if parameters is None:
            return compute(layers, final_norm, x, batch)
        facts = (x.dtype, *map(_facts, layers), *map(_identity, parameters))
        if facts != self._facts:  # the model is not what was recorded
            self._forget()
            self._facts, self._place = facts, _lies_at(layers)
        recorded = self._recorded_for(shape, compute, layers, final_norm, x, batch)
        if recorded is None:
            return compute(layers, final_norm, x, batch)
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        return _Replay.apply(recorded, x, batch.cu_seqlens, *wanted)

    def _can(self, layers: list[Layer], x: torch.Tensor, batch: Batch) -> bool:
        if self.graphs.obstacle is not None or not x.requires_grad or not torch.is_grad_enabled():
            return False
        # Who looks at all that is saved, as checkpointing does, would find it here in one pass and not in another.
        if not self._is_free() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return False
        if any(layer.module.training and getattr(layer.module, "gradient_checkpointing", False) for layer in layers):
            return False
        return self._is_alone(x) and fits_tapes(layers, x, batch)

    def _is_free(self) -> bool:
        """Whether no result waits for its backward pass."""
        turn = self.latest()
        return turn is None or turn.done

    def _is_alone(self, x: torch.Tensor) -> bool:
        """Whether work for x comes behind all that the graphs did before, and becomes part of no other graph."""
        if not x.is_cuda:
            return True
        if x.get_device() != torch.cuda.current_device() or torch.cuda.is_current_stream_capturing():
            return False
        stream = torch.cuda.current_stream().cuda_stream
        self._stream = stream if self._stream is None else self._stream
        return stream == self._stream

    def _forget(self) -> None:
        self._facts, self._recorded, self.gradients, self.latest = None, {}, [], lambda: None
        self._seen.clear()
        self.graphs.forget()

    def _recorded_for(self, shape: Shape, compute: Compute, layers, final_norm, x, batch) -> "_Recorded | None":
        """What is recorded of a shape, from the second time on; it keeps the tables of the layers, and so their ids."""
        key = (shape, *(id(layer.tables[0]) for layer in layers))
        again = key in self._seen and key not in self._recorded
        self._seen.add(key)
        if again and len(self._recorded) < _MOST_SHAPES:
            self._record(key, shape, compute, *_apart(layers, final_norm), x, batch)
        return self._recorded.get(key)

    def _record(self, key: Hashable, *arguments) -> None:
        try:
            self._recorded[key] = _Recorded(self, key, *arguments)
        except torch.OutOfMemoryError:
            self.graphs.obstacle = "out of memory"
        if self.graphs.obstacle is not None:
            self._forget()


REPLAYS = "_cramfast_replays"
"""The attribute of a base model that has them."""


def replays_of(base: nn.Module, device: torch.device) -> Replays:
    """Those of a base model, made when they are first asked for."""
    replays = base.__dict__.get(REPLAYS)
    if replays is None or replays.device != device:
        replays = base.__dict__[REPLAYS] = Replays(device)
    return replays


class _Recorded:
    """The two graphs of one shape, and the tensors that they read and write."""

    def __init__(self, replays: Replays, key: Hashable, shape: Shape, compute: Compute, layers, final_norm, x, batch):
        self.replays, self.shape = replays, shape
        self._keys = forward, backward = (key, "forward"), (key, "backward")
        self._compute, self._layers, self._final_norm = compute, layers, final_norm
        self._wanted = [parameter for parameter in _parameters(layers, final_norm) if parameter.requires_grad]
        if not replays.gradients:
            replays.gradients = [torch.empty_like(parameter, requires_grad=False) for parameter in self._wanted]
        self.x = x.new_zeros((shape.tokens, x.shape[1])).requires_grad_()
        self.dy = torch.zeros_like(self.x, requires_grad=False)
        self.cu_seqlens = batch.cu_seqlens.new_zeros(shape.sequences + shape.fillers + 1)
        self._ends = torch.arange(1, shape.fillers + 1, dtype=torch.int32, device=x.device) * shape.longest
        self._batch = replace(batch, cu_seqlens=self.cu_seqlens, max_seqlen=shape.longest)
        self._fill(x.detach(), batch.cu_seqlens)
        graphs = replays.graphs
        # Random numbers go on as if nothing had been recorded.
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            graphs.run_aside(self._both)
            if graphs.capture(forward, self._forward):
                graphs.capture(backward, self._backward)
        self.y = self.y.detach()

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, _Turn]:
        """Hidden states (T, C) of x (T, C), and whose turn it is until they are computed again."""
        self._fill(x, cu_seqlens)
        self.replays.graphs.replay(self._keys[0])
        turn = _Turn(self._versions())
        self.replays.latest = weakref.ref(turn)
        return self.y[: x.shape[0]].detach().clone(), turn

    def backward(self, dy: torch.Tensor, turn: _Turn) -> tuple[torch.Tensor, ...]:
        """The gradients of x and of the parameters that have one, for the batch whose `turn` it is."""
        if turn.done or self.replays.latest() is not turn:
            # Activations had their place in memory until the first pass needed it for others.
            raise RuntimeError(
                "cramfast.accelerate: a second backward pass through layers that run as CUDA graphs; "
                "accelerate(model, graphs=False) keeps what it needs"
            )
        if turn.versions != self._versions():
            raise RuntimeError(
                "cramfast.accelerate: parameters were changed between a forward pass and its backward pass"
            )
        turn.done = True
        tokens = dy.shape[0]
        self.dy[:tokens].copy_(dy)
        self.dy[tokens:].zero_()
        self.replays.graphs.replay(self._keys[1])
        return self.dx[:tokens].clone(), *_copied(self.replays.gradients)

    def _versions(self) -> int:
        """Another number after every operation in place on a parameter, which the backward pass reads once more."""
        return sum([parameter._version for parameter in self._wanted])

    @torch.no_grad()
    def _fill(self, x: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        self.x[: x.shape[0]].copy_(x)
        # Whatever is there would do, if it were sure to be finite.
        self.x[x.shape[0] :].zero_()
        self.cu_seqlens[: self.shape.sequences + 1].copy_(cu_seqlens)

    def _both(self) -> None:
        self._forward()
        self._backward()

    @torch.enable_grad()
    def _forward(self) -> None:
        last = self.shape.sequences
        torch.clamp(self.cu_seqlens[last] + self._ends, max=self.shape.tokens, out=self.cu_seqlens[last + 1 :])
        self.y = self._compute(self._layers, self._final_norm, self.x, self._batch)

    def _backward(self) -> None:
        self.dx, *gradients = torch.autograd.grad(self.y, (self.x, *self._wanted), self.dy)
        torch._foreach_copy_(self.replays.gradients, gradients)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recorded, x, cu_seqlens, *_parameters):
        y, ctx.turn = recorded.forward(x, cu_seqlens)
        ctx.recorded = recorded
        return y

    @staticmethod
    def backward(ctx, dy):
        expect_first_derivative("kernels of cramfast")
        dx, *gradients = ctx.recorded.backward(dy, ctx.turn)
        return None, dx, None, *gradients


def _copied(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors of one dtype, in one allocation."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = tensors[0].new_empty(sum(sizes)).split_with_sizes(sizes)
    copies = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(copies, tensors)
    return copies


def _apart(layers: list[Layer], final_norm: nn.LayerNorm | None) -> tuple[list[Layer], nn.LayerNorm | None]:
    """The same over tensors that share the memory of the parameters, and nothing else."""
    tensors: dict[int, torch.Tensor] = {}

    def apart(module: nn.Module | None) -> nn.Module | None:
        if module is None:
            return None
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        for p in parameters.values():
            if id(p) not in tensors:
                tensors[id(p)] = p.detach().requires_grad_(p.requires_grad)
        other = copy.copy(module)
        other._parameters = module._parameters | {name: tensors[id(p)] for name, p in parameters.items()}
        return other

    names = ("out", "attention_norm", "wide", "narrow", "mlp_norm")
    others = [
        replace(layer, qkv=tuple(map(apart, layer.qkv)), **{name: apart(getattr(layer, name)) for name in names})
        for layer in layers
    ]
    return others, apart(final_norm)


def _parameters(layers: list[Layer], final_norm: nn.LayerNorm | None) -> list[torch.Tensor] | None:
    """All parameters, each once; None unless one of them at least is trained, all of one dtype on one device."""
    norms = [norm for layer in layers for norm in (layer.attention_norm, layer.mlp_norm)] + [final_norm]
    found = [member for layer in layers for group in layer.groups() if group is not None for member in group]
    found += [member for norm in norms if norm is not None for member in parameters_of(norm) if member is not None]
    parameters = [*{id(parameter): parameter for parameter in found}.values()]
    kinds = {(parameter.dtype, parameter.device, parameter.is_leaf) for parameter in parameters}
    alike = len(kinds) == 1 and parameters[0].is_leaf
    return parameters if alike and any(parameter.requires_grad for parameter in parameters) else None


def _lies_at(layers: list[Layer]) -> int:
    """The address of the first parameter, which moves with the others."""
    return parameters_of(layers[0].out)[0].data_ptr()


def _identity(parameter: torch.Tensor) -> tuple:
    """Where it lies and how, and whether it is trained."""
    return parameter.data_ptr(), parameter.stride(), parameter.requires_grad


def _facts(layer: Layer) -> tuple:
    """What of a layer is not a parameter and yet part of a graph."""
    modules = (layer.module, layer.out_dropout, layer.narrow_dropout, layer.inner_dropout)
    norms = (layer.attention_norm, layer.mlp_norm)
    return (
        (layer.heads, layer.attention_dropout, layer.window, layer.gated, gelu_form(layer.activation)),
        tuple([None if module is None else (module.training, getattr(module, "p", 0.0)) for module in modules]),
        tuple([None if norm is None else norm.eps for norm in norms]),
    )
