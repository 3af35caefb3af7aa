"""cramfast: pretrain BERT-class encoders from scratch on one GPU in a fixed budget."""

from pathlib import Path

__version__ = "0.1.0"

# An installed wheel holds cramfast/kernels; in a clone that folder is this one's sibling.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))


def load(path):
    """The `Bert` saved in a run, a checkpoint or a `final` folder, in evaluation mode on the CPU."""
    from .train.checkpoint import load_model

    return load_model(path)
