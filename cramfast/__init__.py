"""cramfast: pretrain BERT-class encoders from scratch on one GPU in a fixed budget."""

from pathlib import Path

__version__ = "0.1.0"

# An installed wheel holds cramfast/kernels; in a clone that folder is this one's sibling.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))


def load(path):
    """A saved `Bert` in evaluation mode on the CPU.

    path: a cramfast run, a checkpoint or a `final`; a folder of a BERT or ModernBERT that Hugging Face's transformers
    saved, or the id of one on the hub. Raises `cramfast.errors.UserError` for what is none of these, or is damaged.
    """
    from .pretrained import load

    return load(path)


def accelerate(model, logits=None, graphs=True):
    """Have a BERT, RoBERTa, DistilBERT, ELECTRA or ModernBERT of transformers run on this project's kernels, in place.

    Returns what was swapped and what was left, and how to undo it. `cramfast.accelerated.accelerate` tells the rest.
    """
    from .accelerated import accelerate

    return accelerate(model, logits, graphs)
