"""Which of attention's kernels run on which card, and with how many warps and stages."""

import functools
from dataclasses import dataclass

import torch

from .attention_hopper_blocks import backward_blocks_hopper
from .attention_hopper_steps import backward_steps_hopper
from .attention_hopper_tile_backward import backward_tile_hopper
from .attention_hopper_tile_forward import forward_tile_hopper
from .attention_kernels import backward_keys, backward_queries, backward_tile, forward_blocks, forward_tile
from .language import GLUON_AVAILABLE, triton
from .launch import Launch, catalogue

HEAD_SIZES, LONGEST = (32, 64, 96, 128), 512
DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)  # below, Triton has no matrix products to speak of
BLOCK = 64


@dataclass(frozen=True)
class Tuning:
    """num_warps and num_stages of a kernel; `registers`: the most a thread may have; `programs`: how many stay on each
    multiprocessor and go from one piece of work to the next, 0 for a program for each; `step`: how many rows a block
    meets at a time."""

    num_warps: int
    num_stages: int
    registers: int | None = None
    programs: int = 0
    step: int = BLOCK


@dataclass(frozen=True)
class Ring:
    """For `attention_hopper_tile_forward.py` and `_backward.py`: stages, and how many warps prepare and move tiles,
    beside the eight that multiply, with how many registers a thread; `programs` as in `Tuning`."""

    stages: int
    preparers: int
    preparers_registers: int
    movers: int
    movers_registers: int
    programs: int = 1


@dataclass(frozen=True)
class Resident:
    """For the kernel of `attention_hopper_blocks.py`: how many registers a thread has of the eight warps that multiply,
    beside four that move blocks; `programs` as in `Tuning`."""

    registers: int
    programs: int = 1


@dataclass(frozen=True)
class Steps:
    """For the kernel of `attention_hopper_steps.py`: how many registers a thread has of the eight warps that multiply,
    and of the four that load, beside four that store; `programs` as in `Tuning`."""

    registers: int
    loader_registers: int
    programs: int = 1


AnyTuning = Tuning | Ring | Resident | Steps


@dataclass(frozen=True)
class Setting:
    """A tuning for each kernel of a forward and a backward pass; only blocks have `backward_keys`, where backward takes
    two passes."""

    forward: Tuning | Ring
    backward: AnyTuning
    backward_keys: Tuning | None = None


_SMALL_TILE = Setting(Tuning(4, 1), Tuning(4, 1))
_SMALL_TURNED_TILE = Setting(Tuning(4, 1, registers=96), Tuning(4, 1))
_SMALL_TURNED_MASKED_TILE = Setting(Tuning(4, 2, programs=4), Tuning(4, 1))
_RING = Setting(Ring(3, 4, 56, 4, 64), Ring(3, 4, 56, 4, 80))
_DROPPING_RING = Setting(Ring(3, 4, 56, 4, 64), Ring(3, 4, 56, 4, 40))
_TURNED_RING = Setting(Ring(4, 8, 56, 4, 40), Ring(3, 4, 104, 4, 24))
_MASKED_RING = Setting(Ring(4, 4, 40, 4, 72), Ring(3, 4, 24, 4, 96))
_TURNED_MASKED_RING = Setting(Ring(4, 8, 56, 4, 48), Ring(3, 4, 96, 4, 48))
_DENSE_BLOCKS = Setting(Tuning(4, 3), Tuning(4, 3), Tuning(4, 3, registers=128, step=32))
_BLOCKS = Setting(Tuning(4, 3), Tuning(4, 3, step=32), Tuning(4, 4, step=32))
_RESIDENT_BLOCKS = Setting(Tuning(4, 3), Resident(224))
_STEPS = Setting(Tuning(4, 3), Steps(208, 48))
_DROPPING_BLOCKS = Setting(Tuning(4, 3), Tuning(4, 3, step=32), Tuning(4, 3, step=32))
_WIDE_BLOCKS = Setting(Tuning(8, 2), Tuning(8, 2), Tuning(8, 2, step=32))
_WIDE_BLOCKS_OF_120 = Setting(Tuning(8, 2), Tuning(8, 1), Tuning(8, 2, step=32))
_BLOCKS_BEFORE_HOPPER = Setting(Tuning(4, 2), Tuning(4, 2), Tuning(4, 2, step=32))
_DROPPING_BLOCKS_BEFORE_HOPPER = Setting(Tuning(4, 2, step=32), Tuning(4, 2, step=32), Tuning(4, 2, step=32))


def tile_for(head_size: int, longest: int, rotary: bool, dropout: bool, capability: int) -> int:
    """The tile that holds a group of sequences of up to `longest` tokens on cards of `capability` (90 for 9.0); 0 where
    blocks serve better: past 128 tokens, and where a tile is too much for registers or shared memory."""
    if head_size <= 64 and longest <= 64 and not ((rotary or dropout) and capability >= 120):
        return 64
    return 128 if GLUON_AVAILABLE and head_size <= 64 and longest <= 128 and 90 <= capability < 100 else 0


def packs(tile: int, native: bool = True) -> bool:
    """Whether a tile holds sequences from anywhere in the batch, as `pack_sequences` lays them out, or neighbours."""
    return tile == 128 and native


def block_for(head_size: int, capability: int) -> int:
    """Tokens of which groups are made where there is no tile: as many as go together at the most, and of which a group
    that needs no mask has a multiple. 128 where a kernel for Hopper takes the backward pass."""
    one_pass = GLUON_AVAILABLE and head_size <= 64 and 90 <= capability < 100
    return 2 * BLOCK if one_pass else BLOCK


def setting_for(
    tile: int, head_size: int, longest: int, masked: bool, rotary: bool, dropout: bool, capability: int,
    native: bool = True,
) -> Setting:  # fmt: skip
    """What runs on cards of `capability` for groups of this tile, see `tile_for`. native: on the card itself; the
    interpreter does not know Gluon."""
    if packs(tile, native):
        if masked:
            return _TURNED_MASKED_RING if rotary else _MASKED_RING
        return _TURNED_RING if rotary else _DROPPING_RING if dropout else _RING
    if tile and rotary and 90 <= capability < 100:
        return _SMALL_TURNED_MASKED_TILE if masked else _SMALL_TURNED_TILE
    if tile:
        return _SMALL_TILE
    if native and block_for(head_size, capability) > BLOCK:
        return _RESIDENT_BLOCKS if longest <= 256 else _STEPS
    if head_size > 64:
        return _WIDE_BLOCKS if capability < 120 else _WIDE_BLOCKS_OF_120
    if 90 <= capability < 120:
        return _DENSE_BLOCKS if not masked else _DROPPING_BLOCKS if dropout else _BLOCKS
    return _DROPPING_BLOCKS_BEFORE_HOPPER if dropout else _BLOCKS_BEFORE_HOPPER


@functools.lru_cache
def launch_for(
    kernel, tuning: AnyTuning, tensors: tuple, heads: int, head_size: int, tile: int, windowed: bool
) -> Launch:
    """One of the kernels for `tensors`, a dtype for each of its pointers, in tiles, or blocks where `tile` is 0. With a
    ring, the kernel for Hopper that does the same; where one kernel does all of the backward pass over blocks,
    `backward_queries` stands for it."""
    # Without masks, sequences fill tiles or blocks: their tokens, and those of all together, are a multiple of 16.
    tokens = "i32" if torch.int32 in tensors else "i32:16"
    scalars = (tokens, "i32" if tile else tokens, "i32", "fp32", "fp32")
    constants, size = {"H": heads, "D": head_size}, {"TILE" if tile else "BLOCK": tile or BLOCK}
    if isinstance(tuning, Ring):
        scalars = (tokens, "i32", "fp32", "fp32")
        kernel = forward_tile_hopper if kernel is forward_tile else backward_tile_hopper
        constants |= size | {"STAGES": tuning.stages}
        constants |= {"PREPARERS": tuning.preparers, "PREPARERS_REGISTERS": tuning.preparers_registers}
        constants |= {"MOVERS": tuning.movers, "MOVERS_REGISTERS": tuning.movers_registers}
        return Launch(kernel, tensors, scalars, constants, num_warps=8)
    if isinstance(tuning, Resident):
        constants |= {"WINDOWED": windowed, "MULTIPLIERS": 8, "MULTIPLIERS_REGISTERS": tuning.registers}
        return Launch(backward_blocks_hopper, tensors, scalars, constants, num_warps=4)
    if isinstance(tuning, Steps):
        constants |= {"WINDOWED": windowed, "MULTIPLIERS_REGISTERS": tuning.registers}
        constants |= {"LOADERS_REGISTERS": tuning.loader_registers}
        return Launch(backward_steps_hopper, tensors, scalars, constants, num_warps=4)
    constants |= {"WIDTH": triton.next_power_of_2(head_size)} | size
    if not tile:
        constants["STEP"] = tuning.step
    constants |= {"STAGES": tuning.num_stages, "WINDOWED": windowed}
    return Launch(kernel, tensors, scalars, constants, tuning.num_warps, tuning.registers)


@catalogue
def _launches(dtype, capability):
    if dtype not in DTYPES or capability < 10 * CAPABILITY[0]:
        return []
    every = [(masked, rotary, False) for masked in (False, True) for rotary in (False, True)]
    with_dropout = (True, False, True)
    of_hopper = {(32, longest): [every[0], every[-1]] for longest in (128, 256, 512)}
    of_hopper |= {(64, 128): [*every, with_dropout], (64, 256): [*every, with_dropout]}
    cases = {
        (64, 64): [*every, with_dropout],
        **(of_hopper if capability == 90 else {}),
        (64, 512): [*every, with_dropout],
        (128, 512): [(True, True, False)],
    }
    return dict.fromkeys(
        launch
        for (head_size, longest), options in cases.items()
        for masked, rotary, dropout in options
        for launch in _pass(dtype, head_size, longest, masked, rotary, dropout, capability)
    )


def _pass(dtype, head_size, longest, masked, rotary, dropout, capability):
    """The kernels of a forward and a backward pass of a model with 12 heads."""
    tile = tile_for(head_size, longest, rotary, dropout, capability)
    setting = setting_for(tile, head_size, longest, masked, rotary, dropout, capability)
    f32, seed = torch.float32, torch.int64 if dropout else None
    groups, angles = (torch.int32 if masked else None,) * 2, torch.float16 if rotary else None
    if tile:
        options = (*groups, angles, seed)
        kernels = [
            (forward_tile, setting.forward, (dtype, *options, dtype, f32)),
            (backward_tile, setting.backward, (dtype, dtype, f32, *options, dtype)),
        ]
    elif setting.backward_keys is None:
        delta = (f32,) if isinstance(setting.backward, Steps) else ()
        kernels = [
            (forward_blocks, setting.forward, (dtype, *groups, seed, dtype, f32)),
            (backward_queries, setting.backward, (dtype, dtype, dtype, f32, *groups, angles, seed, dtype, *delta)),
        ]
    else:
        options = (*groups, angles, seed)
        kernels = [
            (forward_blocks, setting.forward, (dtype, *groups, seed, dtype, f32)),
            (backward_queries, setting.backward, (dtype, dtype, dtype, f32, *options, dtype, f32)),
            (backward_keys, setting.backward_keys, (dtype, dtype, f32, f32, *options, dtype)),
        ]
    for kernel, tuning, tensors in kernels:
        yield launch_for(kernel, tuning, tensors, 12, head_size, tile, False)
