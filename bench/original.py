"""The original cramming project's model and step, from its own package (https://github.com/JonasGeiping/cramming).

What it computes and trains with is read from the files of its own that its command `pretrain.py arch=crammed-bert
train=bert-o4` reads, `impl/torch-default` among them. C hidden size, H heads, D head size, I intermediate size.
"""

import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from cramfast.config import ModelConfig

from .hugging_face import padded_arguments
from .steps import OPTIMIZER, Ordinary, Outcome, StepPeer, TorchStep, Training, initial_bert

_INSTALL = "pip install git+https://github.com/JonasGeiping/cramming"
_MODULES = ("cramming", "transformers", "omegaconf", "einops")
_ARCHITECTURES = "cramming_architectures"
_PARTS = {
    "embeddings.tokens": "embedding.word_embedding",
    "embeddings.positions": "embedding.pos_embedding",
    "embeddings.norm": "embedding.norm",
    "attention_norm": "norm1",
    "attention.qkv": "attn.self_attention.query_key_value",
    "attention.out": "attn.dense",
    "mlp_norm": "norm2",
    "mlp.0": "ffn.dense_in",
    "mlp.2": "ffn.dense_out",
    "final_norm": "final_norm",
}


def _folder() -> Path:
    """That of the package, which is found without being run."""
    return Path(importlib.util.find_spec("cramming").submodule_search_locations[0])


@cache
def _crammed_bert() -> ModuleType:
    """Their module of the model.

    Importing `cramming` would import all that it trains and evaluates with (datasets, hydra, …), none of which a step
    needs and any of which may have changed since. So its folder of architectures becomes a package by itself.
    """
    spec = importlib.machinery.ModuleSpec(_ARCHITECTURES, None, is_package=True)
    spec.submodule_search_locations = [str(_folder() / "architectures")]
    sys.modules[_ARCHITECTURES] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{_ARCHITECTURES}.crammed_bert")


def settings(name: str):
    """What is in their file `config/<name>.yaml`, an omegaconf DictConfig."""
    from omegaconf import OmegaConf

    return OmegaConf.load(_folder() / "config" / f"{name}.yaml")


def original_weights(weights: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """A state dict of crammed-bert as `Bert` has it, as theirs."""
    H, D = config.num_heads, config.head_size
    theirs = {"decoder.weight": weights["embeddings.tokens.weight"]}
    for name, weight in weights.items():
        layer, part, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(\w+)", name).groups(default="")
        if part == "attention.qkv":  # rows (3, H, D) → (H, 3, D)
            weight = weight.unflatten(0, (3, H, D)).transpose(0, 1).flatten(0, 2)
        elif part == "mlp.0":  # rows (2, I), of which theirs takes the second half through GELU
            weight = weight.unflatten(0, (2, -1)).flip(0).flatten(0, 1)
        theirs[f"encoder.{layer}{_PARTS[part]}.{kind.replace('scale', 'scale_factor')}"] = weight
    factors = [f"encoder.layers.{number}.attn.self_attention.norm_factor" for number in range(config.num_layers)]
    return theirs | dict.fromkeys(factors, torch.tensor(D**-0.5))


def original_bert(config: ModelConfig) -> nn.Module:
    """Their crammed-bert of this size, with the weights that this project's model starts from."""
    from omegaconf import OmegaConf

    arch = OmegaConf.create({"arch": settings("arch/crammed-bert"), "train": settings("train/bert-o4")}).arch
    arch.num_transformer_layers, arch.hidden_size = config.num_layers, config.hidden_size
    arch.intermed_size, arch.attention.num_attention_heads = config.wide_size, config.num_heads
    arch.embedding.max_seq_length = config.max_positions
    model = _crammed_bert().construct_crammed_bert(arch, config.vocab_size)
    model.load_state_dict(original_weights(initial_bert(config).state_dict(), config))
    return model


def adamw(model: nn.Module, train) -> torch.optim.Optimizer:
    """Their AdamW, which leaves to torch whether it is fused, at the learning rate of every variant."""
    options = settings("train/optim/adam")
    options.merge_with(train.optim, {"lr": OPTIMIZER.lr})
    kind = getattr(torch.optim, options.pop("type"))
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[any(key in name for key in train.limited_decay_keys)].append(parameter)
    return kind([{"params": groups[False]}, {"params": groups[True], "weight_decay": 0.0}], **options)


def compile_arguments(impl) -> dict[str, object]:
    """How their engine calls torch.compile, but for CUDA graphs: a batch of this size keeps the GPU busy without, and
    what a graph returns, such as the first loss, which is compared, is overwritten by its next call."""
    options = {}
    for name, value in impl._inductor_vars.items():
        options |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, Mapping) else {name: value}
    options["triton.cudagraphs"] = False
    return {"dynamic": impl.dynamic, "fullgraph": impl.fullgraph, "backend": impl.backend, "options": options}


class OriginalStep(TorchStep):
    """Their engine's step, its schedules of learning rate and batch size aside, on the batch as masked before."""

    def __init__(self, training: Training):
        train = settings("train/bert-o4")
        model = original_bert(training.work.config).to(training.device).train(train.pretrain_in_train_mode)
        torch._dynamo.reset()  # as for the other compiled variants
        call = torch.compile(model, **compile_arguments(settings("impl/torch-default")))
        options = replace(OPTIMIZER, clip=train.gradient_clipping)
        self.arguments = padded_arguments(training.batch)
        super().__init__(_ORIGINAL, model, options, training.dtype, call, adamw(model, train))

    def __call__(self) -> Outcome:
        return self.take(self.arguments)


class OriginalPeer(StepPeer):
    """Skipped where the package, or what its model imports, is not there or does not fit."""

    def missing(self) -> str | None:
        """Why this peer cannot run here; None when it can."""
        absent = [module for module in _MODULES if importlib.util.find_spec(module) is None]
        if absent:
            return f"{absent[0]} is not installed, which {self.who} takes: {_INSTALL}"
        try:
            _crammed_bert()
        except Exception as error:  # made for versions of years ago, it can fail in any way
            return f"{self.who} cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
        return None


_ORIGINAL = Ordinary("cramming", original_bert, padded_arguments)
ORIGINAL = OriginalPeer("cramming-original", OriginalStep)
