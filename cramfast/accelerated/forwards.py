"""What takes the place of a model's forward: padded batches in, padded results out, nothing padded between.

B sequences of S places, T real tokens, M predicted ones, C hidden size.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..kernels import mlm_loss
from .batch import IGNORED, Batch, Counts, count, predictions, unpadded
from .encoder import run_layers
from .families import Family
from .graphs import replays_of

_TAKEN = {"input_ids", "attention_mask", "token_type_ids", "return_dict", "labels", "num_items_in_batch"}
# What heads of ModernBERT in transformers 4 tell of the batch.
_TAKEN |= {"batch_size", "seq_len"}

Given = dict[str, Any]
"""Arguments by name, without those that are None."""


def replace_forward(module: nn.Module, forward: Callable) -> None:
    """Put `forward(module, given, own)` in place of the module's own, under the same signature.

    It is bound to the module and holds on to nothing else, so that a deep copy runs on its own weights.
    """
    own = type(module).forward
    signature = inspect.signature(own)
    names = [*signature.parameters][1:]

    def replacement(self, *args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        return forward(self, {name: x for name, x in given.items() if x is not None}, own)

    # Not as functools.wraps does it: who unwraps a forward, as accelerate does, must end here.
    replacement.__name__, replacement.__doc__, replacement.__signature__ = "forward", own.__doc__, signature
    module.forward = MethodType(replacement, module)


def base_forward(family: Family, by_token: bool, graphs: bool) -> Callable:
    """Of a base model. by_token: nobody looks at the first place of a sequence where that is padding. graphs: as
    `accelerate` takes it."""

    def forward(self: nn.Module, given: Given, own: Callable):
        obstacle = _obstacle(self, family, given)
        if obstacle is None:
            real = _real(given)
            counts = _full(given["input_ids"]) if real is None else count(real)
            obstacle = _obstacle_in(counts, family, by_token)
        if obstacle is not None:
            warnings.warn(f"cramfast.accelerate: {type(self).__name__} runs as before: {obstacle}", stacklevel=2)
            return own(self, **given)
        batch = _batch(self, family, given, real, counts)
        hidden_BSC = batch.padded(_encode(self, family, batch, graphs=graphs))
        return _base_output(self, hidden_BSC, given)

    return forward


def mlm_forward(family: Family, logits: bool | None) -> Callable:
    """Of a masked-language-modelling model; logits as `accelerate` takes it."""

    def forward(self: nn.Module, given: Given, own: Callable):
        base, labels = self.base_model, given.get("labels")
        if labels is None or _obstacle(base, family, given) is not None:
            return own(self, **given)
        real = _real(given)
        counts = count(torch.ones_like(labels, dtype=torch.bool) if real is None else real, labels)
        if counts.stray:
            raise ValueError(f"cramfast.accelerate: labels count {counts.stray} places of padding, expected {IGNORED}")
        wanted = not self.training if logits is None else logits
        foreign = getattr(self, "sparse_pred_ignore_index", IGNORED) != IGNORED
        if wanted or foreign or _obstacle_in(counts, family, by_token=True) is not None:
            return own(self, **given)
        batch = _batch(base, family, given, real, counts)
        loss = _mlm_loss(self, family, batch, labels, counts)
        if family.counts_items and "num_items_in_batch" in given:
            loss = loss * (counts.predicted / given["num_items_in_batch"])
        from transformers.modeling_outputs import MaskedLMOutput

        return _as_asked(MaskedLMOutput(loss=loss), self, given)

    return forward


def _mlm_loss(model: nn.Module, family: Family, batch: Batch, labels: torch.Tensor, counts: Counts) -> torch.Tensor:
    """Mean loss of predicting the labels (B, S) that count."""
    rows, labels_M = predictions(batch, labels, counts)
    head = family.head(model)
    hidden_MC = head.transform(_encode(model.base_model, family, batch, rows))
    return mlm_loss(hidden_MC, head.decoder.weight, labels_M, bias=head.decoder.bias)


def _encode(
    base: nn.Module, family: Family, batch: Batch, rows: torch.Tensor | None = None, graphs: bool = False
) -> torch.Tensor:
    """Hidden states (T, C) of the batch, or (M, C) of `rows` (M,)."""
    x = family.embed(base, batch)
    layers, final_norm = family.layers(base, batch.max_seqlen), getattr(base, "final_norm", None)
    if graphs and not torch.compiler.is_compiling():
        return replays_of(base, x.device).run(partial(run_layers, family.block), layers, final_norm, x, batch)
    return run_layers(family.block, layers, final_norm, x, batch, rows)


def _base_output(base: nn.Module, hidden_BSC: torch.Tensor, given: Given):
    from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions

    if not hasattr(base, "pooler"):
        return _as_asked(BaseModelOutput(last_hidden_state=hidden_BSC), base, given)
    pooled = None if base.pooler is None else base.pooler(hidden_BSC)
    output = BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden_BSC, pooler_output=pooled)
    return _as_asked(output, base, given)


def _as_asked(output, model: nn.Module, given: Given):
    """The output, or a tuple where the caller or the configuration asks for one."""
    return output if given.get("return_dict", getattr(model.config, "return_dict", True)) else output.to_tuple()


def _real(given: Given) -> torch.Tensor | None:
    """Where the mask has tokens, bool (B, S); None without a mask."""
    return None if "attention_mask" not in given else given["attention_mask"] != 0


def _full(input_ids: torch.Tensor) -> Counts:
    batch, length = input_ids.shape
    return Counts(tokens=batch * length, longest=length, shortest=length)


def _batch(base: nn.Module, family: Family, given: Given, real: torch.Tensor | None, counts: Counts) -> Batch:
    input_ids = given["input_ids"]
    positions = None if family.positions is None else family.positions(base, input_ids)
    return unpadded(input_ids, real, counts, positions, given.get("token_type_ids"))


def _obstacle(base: nn.Module, family: Family, given: Given) -> str | None:
    """Why a call needs the model's own forward, as far as the arguments' shapes tell; None when it does not."""
    others = [name for name, value in given.items() if name not in _TAKEN and value is not False]
    if others:
        return f"{others[0]} is given"
    asked = [name for name in ("output_attentions", "output_hidden_states") if getattr(base.config, name, False)]
    if asked:
        return f"{asked[0]} is set in the configuration"
    input_ids = given.get("input_ids")
    if input_ids is None or input_ids.dim() != 2 or input_ids.numel() == 0:
        return "input_ids are not given as (B, S)"
    if "attention_mask" in given and given["attention_mask"].shape != input_ids.shape:
        return f"attention_mask has shape {tuple(given['attention_mask'].shape)}"
    longest = family.longest(base)
    if longest is not None and input_ids.shape[1] > longest:
        return f"input_ids have {input_ids.shape[1]} places, the model {longest}"
    return None


def _obstacle_in(counts: Counts, family: Family, by_token: bool) -> str | None:
    """The same, as far as the mask tells."""
    if counts.shortest == 0:
        return "a sequence has no token"
    if counts.late and not by_token:
        return "a sequence begins with padding, and its first place may be looked at"
    if counts.pieces > 1 and family.relative:
        return "a sequence has padding between its tokens"
    return None
