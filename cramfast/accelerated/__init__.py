"""This project's kernels inside a live model of Hugging Face's transformers.

No weight is copied and no module exchanged: the forward of the base model, and that of a masked-language-modelling
model, is replaced on the instance by one of `forwards.py`, which takes the padding out, runs `encoder.py` over the
modules that are there, and puts the padding back. `families.py` knows where they are.
"""

from dataclasses import dataclass

from torch import nn

from .encoder import gelu_form
from .families import FAMILIES, Family
from .forwards import base_forward, mlm_forward, replace_forward
from .graphs import REPLAYS

__all__ = ["Accelerated", "accelerate"]

VERSIONS = ((4, 57), (6, 0))
"""Of transformers: from the first of these, below the second."""

_NAME = "cramfast.accelerate"
# Their heads read places that are padding, or expect to see to the left alone.
_REFUSED = ("ForQuestionAnswering", "ForCausalLM", "LMHeadModel")
# Classes of these names look at each token on its own; others may look at the first place of a sequence.
_BY_TOKEN = ("ForMaskedLM", "ForTokenClassification", "ElectraForPreTraining")


@dataclass(frozen=True)
class Accelerated:
    """What `accelerate` did to `model`. swapped: what runs fused; left: what runs as before. `print` shows both."""

    model: nn.Module
    swapped: tuple[str, ...]
    left: tuple[str, ...]
    replaced: tuple[nn.Module, ...]

    def undo(self) -> nn.Module:
        """Give the model its own forward back; returns it."""
        for module in self.replaced:
            for name in ("forward", REPLAYS):
                module.__dict__.pop(name, None)
        return self.model

    def __str__(self) -> str:
        lines = [f"fused: {part}" for part in self.swapped] + [f"as before: {part}" for part in self.left]
        return "\n  ".join([type(self.model).__name__, *lines])


def accelerate(model: nn.Module, logits: bool | None = None, graphs: bool = True) -> Accelerated:
    """Have `model` run on this project's kernels, in place; parameters, state dict and what is saved stay the same.

    model: a BERT, RoBERTa, DistilBERT, ELECTRA or ModernBERT of transformers, of any class but those for question
    answering or causal language modelling, before DDP or torch.compile wrap it. It takes and returns what it did:
    batches padded at the end, in front or, but for ModernBERT, between; hidden states of padding are 0.

    logits: whether a masked-language-modelling model that is given labels returns logits. Without them the head runs on
    the predicted tokens alone, and `output.logits` is None. None: in evaluation mode alone. Of a batch in which nothing
    is predicted the loss is then 0 instead of NaN.

    graphs: whether a GPU runs the layers as CUDA graphs for batches of up to 4096 tokens whose shapes come again, as in
    finetuning; not those of masked language modelling with labels. The graphs keep the activations of the largest such
    batch and a gradient of every parameter of the layers.

    What needs the model's own forward gets it, with a warning: attentions or hidden states as outputs, `inputs_embeds`,
    `position_ids`, head masks, masks other than (B, S), sequences without a token, padding in front where the class may
    look at the first place, padding between tokens of ModernBERT.

    Raises ValueError for a model, a configuration or a version of transformers that is not supported, by name. So does
    a later call where labels of masked language modelling count padding, or where a layer has got another module than
    it was made with, such as an adapter.
    """
    base, family = _supported(model)
    # Of a class that is not transformers' own nobody knows what its forward does.
    name = type(model).__name__ if _is_stock(model) else ""
    predicts = name.endswith("ForMaskedLM")
    by_token = name.endswith(_BY_TOKEN) or (model is base and getattr(base, "pooler", None) is None)
    swapped, left = _summary(model, base, family, predicts)
    replace_forward(base, base_forward(family, by_token, graphs))
    if predicts:
        replace_forward(model, mlm_forward(family, logits))
    return Accelerated(model, swapped, left, (base, model) if predicts else (base,))


def _supported(model: nn.Module) -> tuple[nn.Module, Family]:
    """The base model and its family. Raises ValueError for what is not supported."""
    name, base = type(model).__name__, getattr(model, "base_model", None)
    family = FAMILIES.get(type(base).__name__)
    # What torch.compile wraps a model in passes its attributes on.
    if family is None or not _is_stock(base) or name == "OptimizedModule":
        raise ValueError(f"{_NAME}: {name} is not supported; expected a model around one of {', '.join(FAMILIES)}")
    if name.endswith(_REFUSED):
        raise ValueError(f"{_NAME}: {name} is not supported; its head needs the places that are padding, or a mask")
    _expect_version()
    positions = getattr(base.config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise ValueError(f"{_NAME}: position_embedding_type is {positions}, expected absolute")
    if getattr(base.config, "is_decoder", False):
        raise ValueError(f"{_NAME}: is_decoder is set in the configuration, expected an encoder")
    for module in (base, model):
        if "forward" in module.__dict__:
            raise ValueError(f"{_NAME}: forward of this {type(module).__name__} is replaced already")
    return base, family


def _is_stock(model: nn.Module) -> bool:
    return type(model).__module__.startswith("transformers.")


def _expect_version() -> None:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not VERSIONS[0] <= version < VERSIONS[1]:
        least, end = (".".join(map(str, bound)) for bound in VERSIONS)
        raise ValueError(f"{_NAME}: transformers is {transformers.__version__}, expected {least} or later, below {end}")


def _summary(
    model: nn.Module, base: nn.Module, family: Family, predicts: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is swapped and what is left. Raises ValueError for layers that are not as transformers makes them."""
    layers = family.layers(base, 1)
    number, kind = len(layers), type(layers[0].module).__name__
    norms = 1 + sum(1 + (layer.attention_norm is not None) for layer in layers) + hasattr(base, "final_norm")
    plain = sum(gelu_form(layer.activation) is None for layer in layers)
    swapped = [f"embeddings of {type(base).__name__}", f"{number} × attention of {kind}", f"{norms} × LayerNorm"]
    if number > plain:
        swapped.append(f"{number - plain} × GELU")
    left = [f"{plain} × {type(layers[0].activation).__name__}"] if plain else []
    if predicts:
        family.head(model)
        swapped.append("prediction head and loss, when given labels")
    elif model is not base:
        left.append(f"head of {type(model).__name__}, on padded hidden states")
    left.append(f"hooks on modules inside of {type(base).__name__}, which are not called")
    return tuple(swapped), tuple(left)
