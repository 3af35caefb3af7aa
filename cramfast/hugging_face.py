"""BERT and ModernBERT as Hugging Face's transformers stores them, there and back: config.json and names of weights.

Nothing here needs transformers. "Stored" names are those of the masked-language-modelling class of a family.
Shapes: C hidden size.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .config import ModelConfig
from .data.tokenizer import SpecialIds
from .errors import UserError
from .model import Bert

_LISTED = 3


@dataclass(frozen=True)
class Family:
    """How one architecture of transformers is stored.

    outside, inside: stored names of the modules of a `Bert`, and of a layer's after `layers` and its number. qkv: the
    modules of a layer whose rows, one after the other, are those of `attention.qkv`. bare: starts of the names that
    lack `base` where the encoder was stored without a head. heads: starts of names that are all there or all absent.
    copies: weights that may be stored once more, by the name of the copy. dropped: starts of names that have no place
    in a `Bert`. required: the settings of a `ModelConfig` that the architecture has no choice about.
    """

    model_type: str
    architecture: str
    base: str
    bare: tuple[str, ...]
    outside: dict[str, str]
    layers: str
    inside: dict[str, str]
    qkv: tuple[str, ...]
    heads: tuple[str, ...]
    copies: dict[str, str]
    dropped: tuple[str, ...]
    required: dict[str, object]

    def names(self, name: str) -> tuple[str, ...]:
        """Stored names of the parameter `name` of a `Bert`: three for BERT's `qkv`, else one."""
        module, kind = name.rsplit(".", 1)
        if not name.startswith("layers."):
            return (f"{self.outside[module]}.{kind}",)
        _, number, inside = module.split(".", 2)
        modules = self.qkv if inside == "attention.qkv" else (self.inside[inside],)
        return tuple(f"{self.layers}.{number}.{module}.{kind}" for module in modules)


BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    base="bert.",
    bare=("embeddings.", "encoder.", "pooler."),
    outside={
        "embeddings.tokens": "bert.embeddings.word_embeddings",
        "embeddings.positions": "bert.embeddings.position_embeddings",
        "embeddings.token_types": "bert.embeddings.token_type_embeddings",
        "embeddings.norm": "bert.embeddings.LayerNorm",
        "head.transform.0": "cls.predictions.transform.dense",
        "head.transform.2": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions",
    },
    layers="bert.encoder.layer",
    inside={
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.0": "intermediate.dense",
        "mlp.2": "output.dense",
        "mlp_norm": "output.LayerNorm",
    },
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    heads=("cls.predictions.",),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    dropped=("bert.pooler.", "bert.embeddings.position_ids", "cls.seq_relationship.", "classifier.", "qa_outputs."),
    required={
        "norm": "post",
        "norm_bias": True,
        "linear_bias": True,
        "activation": "gelu",
        "positions": "learned",
        "head_transform": True,
        "decoder_bias": True,
        "window": None,
    },
)

MODERNBERT = Family(
    model_type="modernbert",
    architecture="ModernBertForMaskedLM",
    base="model.",
    bare=("embeddings.", "layers.", "final_norm."),
    outside={
        "embeddings.tokens": "model.embeddings.tok_embeddings",
        "embeddings.norm": "model.embeddings.norm",
        "final_norm": "model.final_norm",
        "head.transform.0": "head.dense",
        "head.transform.2": "head.norm",
        "head": "decoder",
    },
    layers="model.layers",
    inside={
        "attention.out": "attn.Wo",
        "attention_norm": "attn_norm",
        "mlp.0": "mlp.Wi",
        "mlp.2": "mlp.Wo",
        "mlp_norm": "mlp_norm",
    },
    qkv=("attn.Wqkv",),
    heads=("head.", "decoder."),
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    dropped=("classifier.", "qa_outputs."),
    required={
        "norm": "pre",
        "first_norm": False,
        "activation": "geglu",
        "positions": "rotary",
        "head_transform": True,
        "token_types": 0,
    },
)

FAMILIES = (BERT, MODERNBERT)


def family_of(config: ModelConfig) -> Family:
    """The architecture that a `Bert` of this config is one of. UserError where there is none, with what differs."""
    obstacles = []
    for family in FAMILIES:
        differing = [
            f"{name} is {getattr(config, name)!r} instead of {value!r}"
            for name, value in family.required.items()
            if getattr(config, name) != value
        ]
        if family is BERT and not config.token_types:
            differing.append("there are no token types")
        if not differing:
            return family
        obstacles.append((len(differing), f"of {family.architecture}, the closest, {', '.join(differing)}"))
    raise UserError(f"no architecture of transformers fits this model: {min(obstacles)[1]}")


def read_config(settings: dict) -> ModelConfig:
    """The config of the model whose config.json is `settings`. UserError for what a `Bert` cannot be."""
    named = settings.get("architectures") or [""]
    kind = settings.get("model_type") or next((f.model_type for f in FAMILIES if f.architecture in named), None)
    if kind == "bert":
        return _read_bert(settings)
    if kind == "modernbert":
        return _read_modernbert(settings)
    raise UserError(f"its model_type is {kind!r} ({named[0] or 'no architecture'}); loaded are bert and modernbert")


def _read_bert(settings: dict) -> ModelConfig:
    _require(settings, "hidden_act", "gelu")
    _require(settings, "position_embedding_type", "absolute")
    for name in ("is_decoder", "add_cross_attention"):
        _require(settings, name, False)
    return ModelConfig(
        vocab_size=_setting(settings, "vocab_size", 30_522),
        hidden_size=_setting(settings, "hidden_size", 768),
        num_layers=_setting(settings, "num_hidden_layers", 12),
        num_heads=_setting(settings, "num_attention_heads", 12),
        intermediate_size=_setting(settings, "intermediate_size", 3072),
        max_positions=_setting(settings, "max_position_embeddings", 512),
        token_types=_setting(settings, "type_vocab_size", 2),
        norm_eps=_setting(settings, "layer_norm_eps", 1e-12),
        initializer_range=_setting(settings, "initializer_range", 0.02),
        **BERT.required,
    )


def _read_modernbert(settings: dict) -> ModelConfig:
    for name in ("hidden_activation", "classifier_activation"):
        _require(settings, name, "gelu")
    _require(settings, "rope_scaling", None)
    biases = {_setting(settings, name, False) for name in ("attention_bias", "mlp_bias", "classifier_bias")}
    if len(biases) > 1:
        raise UserError("attention_bias, mlp_bias and classifier_bias differ; a Bert has one setting for all of them")
    layers = _setting(settings, "num_hidden_layers", 22)
    global_every = _global_every(settings, layers)
    local = {}
    if global_every > 1:
        local = {"window": _setting(settings, "local_attention", 128) // 2, "global_every": global_every}
    theta = _rope_theta(settings, "full_attention", "global_rope_theta", 160_000.0)
    if local:
        local["local_rope_theta"] = _rope_theta(settings, "sliding_attention", "local_rope_theta", 10_000.0)
    return ModelConfig(
        vocab_size=_setting(settings, "vocab_size", 50_368),
        hidden_size=_setting(settings, "hidden_size", 768),
        num_layers=layers,
        num_heads=_setting(settings, "num_attention_heads", 12),
        intermediate_size=_setting(settings, "intermediate_size", 1152),
        max_positions=_setting(settings, "max_position_embeddings", 8192),
        norm_bias=_setting(settings, "norm_bias", False),
        norm_eps=_setting(settings, "norm_eps", 1e-5),
        linear_bias=biases.pop(),
        decoder_bias=_setting(settings, "decoder_bias", True),
        rope_theta=theta,
        initializer_range=_setting(settings, "initializer_range", 0.02),
        **MODERNBERT.required,
        **local,
    )


def _global_every(settings: dict, layers: int) -> int:
    """Every how many layers one sees the whole sequence; 1: all do."""
    kinds = settings.get("layer_types")
    if kinds is None:
        every = _setting(settings, "global_attn_every_n_layers", 3)
        return every if every < layers else layers
    for every in range(1, layers + 1):
        if kinds == ["sliding_attention" if number % every else "full_attention" for number in range(layers)]:
            return every
    raise UserError("its layer_types are not full_attention for every n-th of num_hidden_layers, sliding for the rest")


def _rope_theta(settings: dict, kind: str, old_name: str, default: float) -> float:
    """theta of the layers of a kind, from the config.json of transformers 5 or 4."""
    by_kind = settings.get("rope_parameters") or {}
    parameters = by_kind.get(kind) or {}
    _require(parameters, "rope_type", "default")
    # A local theta that is null says that local layers turn as the others.
    old = settings.get(old_name, default) or settings.get("global_rope_theta", default)
    return float(_setting(parameters, "rope_theta", float(old)))


def _setting(settings: dict, name: str, default):
    """settings[name], of the type of `default`, which stands for one that is absent."""
    value = settings.get(name, default)
    kinds = (int, float) if isinstance(default, float) else type(default)
    fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
    if not fits or (type(default) is int and value < 1):
        raise UserError(f"its {name} is {value!r}, expected a value like {default!r}")
    return value


def _require(settings: dict, name: str, value: object) -> None:
    found = settings.get(name, value)
    if found != value:
        raise UserError(f"its {name} is {found!r}; a Bert has {value!r}")


def write_config(config: ModelConfig, special: SpecialIds) -> dict:
    """The config.json with which transformers loads a model of this config. UserError where no architecture fits."""
    family = family_of(config)
    common = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
        "pad_token_id": special.pad,
        "tie_word_embeddings": True,
    }
    if family is BERT:
        # Dropout is that of the original, for whoever trains it further.
        dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        own = {"type_vocab_size": config.token_types, "layer_norm_eps": config.norm_eps, "hidden_act": "gelu"}
        return common | own | dropout
    return common | _modernbert_settings(config, special)


def _modernbert_settings(config: ModelConfig, special: SpecialIds) -> dict:
    kinds = ["sliding_attention" if config.is_local(i) else "full_attention" for i in range(config.num_layers)]
    window = config.window if config.window is not None else 64
    thetas = {"full_attention": config.rope_theta, "sliding_attention": config.local_rope_theta}
    return {
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": config.linear_bias,
        "mlp_bias": config.linear_bias,
        "classifier_bias": config.linear_bias,
        "decoder_bias": config.decoder_bias,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "local_attention": 2 * window,
        "layer_types": kinds,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
        # The same in the words of transformers 4.
        "global_attn_every_n_layers": config.global_every if config.window is not None else 1,
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": config.local_rope_theta,
        "bos_token_id": special.cls,
        "cls_token_id": special.cls,
        "sep_token_id": special.sep,
        "eos_token_id": special.sep,
    }


@dataclass(frozen=True)
class StoredWeights:
    """Parameters of a `Bert` by name, and the stored names that it has no place for (dropped) and that were not stored
    (fresh), so that they start anew."""

    tensors: dict[str, torch.Tensor]
    dropped: tuple[str, ...]
    fresh: tuple[str, ...]


def write_weights(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Parameters of a `Bert` of this config by stored name. The decoder's weight is the embedding's, stored once."""
    family, stored = family_of(config), {}
    for name, tensor in tensors.items():
        names = family.names(name)
        stored |= zip(names, (part.contiguous() for part in tensor.chunk(len(names))), strict=True)
    return stored


def read_weights(stored: dict[str, torch.Tensor], config: ModelConfig) -> StoredWeights:
    """The inverse of `write_weights`, for what classes with other heads, or with none, have stored as well.

    Raises UserError for weights that are unknown, missing, of the wrong shape, or not floating-point numbers.
    """
    family = family_of(config)
    with torch.device("meta"):
        parameters = Bert(config).state_dict()
    expected = write_weights(parameters, config)
    stored = _without_copies(_full_names(stored, family), family)
    absent = tuple(head for head in family.heads if not any(name.startswith(head) for name in stored))
    fresh = tuple(name for name in expected if name not in stored and name.startswith(absent))
    dropped = tuple(name for name in stored if name not in expected and name.startswith(family.dropped))
    _expect_fitting(stored, expected, {*fresh, *dropped})
    taken = {name: family.names(name) for name in parameters}
    tensors = {
        name: torch.cat([stored[part] for part in parts])
        for name, parts in taken.items()
        if not any(part in fresh for part in parts)
    }
    return StoredWeights(tensors, dropped, fresh)


def _full_names(stored: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """`stored` by the names of today, those of an encoder without a head under `family.base`."""
    named = {}
    for name, tensor in stored.items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        named[family.base + name if name.startswith(family.bare) else name] = tensor
    return named


def _without_copies(stored: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """`stored`, each weight once. Raises UserError where a copy holds something else."""
    single = dict(stored)
    for copy, name in family.copies.items():
        tensor = single.pop(copy, None)
        if tensor is not None and not torch.equal(single.setdefault(name, tensor), tensor):
            raise UserError(f"{copy} differs from {name}; a Bert has one for both (tie_word_embeddings)")
    return single


def _expect_fitting(stored: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], excused: set[str]) -> None:
    """Raise UserError unless `stored` has what is `expected`, by name, shape and kind, and beside it only `excused`."""
    both = [name for name in expected if name in stored]
    shapes = {name: (tuple(stored[name].shape), tuple(expected[name].shape)) for name in both}
    problems = {
        "missing": [name for name in expected if name not in stored and name not in excused],
        "unknown": [name for name in stored if name not in expected and name not in excused],
        "of the wrong shape": [f"{n} {is_} instead of {be}" for n, (is_, be) in shapes.items() if is_ != be],
        "not floating-point": [name for name in both if not stored[name].is_floating_point()],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise UserError(f"weights do not fit config.json: {found}")


def _listed(names: Iterable[str]) -> str:
    """The first few names."""
    names = [*names]
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
