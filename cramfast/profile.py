"""`python -m cramfast.profile`: where the time of a training step goes, per operator, against its own limit."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import cli
from .config import Activations, BatchOptions, Preset, PretrainOptions


@dataclass(frozen=True)
class ProfileOptions:
    """Print where the time of a training step goes, per operator, against the least that its definition takes here.

    A step is one microbatch of random tokens, forward and backward, and one update of random weights.
    """

    preset: Preset | None = None
    """Model. None: cramfast-small on a GPU, cramfast-tiny on a CPU."""
    microbatch_size: int | None = None
    """Sequences, each of --max-length. None: what suits the device."""
    max_length: int = 128
    """Tokens of a sequence."""
    mask_rate: float = 0.25
    """Share of the tokens predicted."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Arithmetic of the matrix products. auto: bfloat16, float16 on older GPUs, float32 on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train."""
    activations: Activations | Literal["auto"] = "auto"
    """What the layers save for the backward pass: all that it reads (keep); not what norms and activation functions put
    out (lean); or nothing but their input (layers); the rest is computed again. auto: the fastest that fits."""
    steps: int = 5
    """Steps that are timed, and as many that are profiled."""
    out: Path | None = None
    """JSON file to write, with the time of every kernel by name. None: none."""


def main(argv: list[str] | None = None) -> int:
    return cli.run(ProfileOptions, _profile, "cramfast.profile", argv)


def _profile(options: ProfileOptions) -> int:
    # Torch reads it when it is loaded: its profiler reports on stderr that it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from .train.profiling import profile  # torch comes with it, which --help need not wait for

    batches = BatchOptions(
        max_length=options.max_length, microbatch_size=options.microbatch_size, mask_rate=options.mask_rate
    )
    settings = {name: getattr(options, name) for name in ("preset", "device", "dtype", "activations")}
    profile(PretrainOptions(**settings, batches=batches), options.steps, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
