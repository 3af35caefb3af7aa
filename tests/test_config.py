import math
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest

from cramfast.config import (
    PRESETS,
    RECIPES,
    BatchOptions,
    Budget,
    Interval,
    ModelConfig,
    OptimizerOptions,
    Preset,
    PretrainOptions,
    Recipe,
    RunOptions,
    TextOptions,
    resolve,
)
from cramfast.errors import UserError

# A value other than any recipe's, for every setting that a recipe fills.
OTHER = {
    "lr": 3e-4,
    "weight_decay": 0.05,
    "clip": 2.0,
    "layout": "packed",
    "order": "shuffled",
    "batch_size": 24,
    "batch_ramp": 0.1,
    "mask_rate": 0.4,
    "max_tokens_per_char": 0.5,
    "optimizer": "adamw",
}
FILLED = [field.name for field in fields(Recipe) if field.name not in ("schedule", "lr_by_width")]


def part_with(options: PretrainOptions, name: str) -> str:
    """The part of the options that has the setting `name`."""
    return next(part for part in ("text", "batches", "optimizer") if hasattr(getattr(options, part), name))


def get(options: PretrainOptions, name: str):
    return getattr(getattr(options, part_with(options, name)), name)


def with_flags(options: PretrainOptions, **settings) -> PretrainOptions:
    for name, value in settings.items():
        part = part_with(options, name)
        options = replace(options, **{part: replace(getattr(options, part), **{name: value})})
    return options


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def test_the_preset_flag_offers_every_preset():
    assert get_args(Preset) == tuple(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_preset_resolves_with_every_recipe(preset, recipe):
    options = resolve(PretrainOptions(preset=preset, recipe=recipe), has_gpu=False)
    # batch_size of the cramfast recipe, microbatch_size and memory_limit depend on the machine, the rest on the person.
    left = {"init_from", "microbatch_size", "memory_limit", "tokenizer", "out", "cache"}
    left |= {"batch_size"} if recipe == "cramfast" else set()
    parts = (options, options.text, options.batches, options.optimizer, options.run)
    assert {f.name for part in parts for f in fields(part) if getattr(part, f.name) is None} == left
    assert options.text.vocab_size == PRESETS[preset].vocab_size
    assert resolve(options, has_gpu=False) == options


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(UserError, match="100 is not a multiple of 3") as error:
        ModelConfig(vocab_size=512, hidden_size=100, num_layers=1, num_heads=3, intermediate_size=200)
    one_line(error)


@pytest.mark.parametrize(("has_gpu", "preset", "budget"), [(True, "cramfast-small", 180), (False, "cramfast-tiny", 75)])
def test_defaults_suit_the_device(has_gpu, preset, budget):
    options = resolve(PretrainOptions(), has_gpu)
    assert options.preset == preset
    assert Budget.parse(options.budget) == Budget(budget, "seconds")


@pytest.mark.parametrize("has_gpu", [True, False])
def test_graphs_are_used_unless_unwanted(has_gpu):
    assert resolve(PretrainOptions(), has_gpu).run.graphs
    assert not resolve(PretrainOptions(run=RunOptions(graphs=False)), has_gpu).run.graphs


def test_more_of_the_built_in_corpus_is_held_out():
    assert resolve(PretrainOptions(), has_gpu=False).text.heldout_fraction == 0.05
    own = PretrainOptions(text=TextOptions(data=("a.txt",)))
    assert resolve(own, has_gpu=False).text.heldout_fraction == 0.01


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fills_what_is_not_given(recipe, name):
    assert get(PretrainOptions(), name) is None
    resolved = resolve(PretrainOptions(recipe=recipe, preset="bert-base"), has_gpu=False)
    assert get(resolved, name) == getattr(RECIPES[recipe], name)


def test_narrower_models_get_a_higher_rate_unless_the_recipe_is_the_papers():
    rates = {
        recipe: [resolve(PretrainOptions(recipe=recipe, preset=preset), False).optimizer.lr for preset in presets]
        for recipe, presets in {
            "cramfast": ("cramfast-tiny", "cramfast-small", "cramfast-base", "bert-large"),
            "cramming": ("cramfast-tiny", "bert-large"),
        }.items()
    }
    assert rates == {"cramfast": [1.7e-3, 1.2e-3, 1e-3, 8.7e-4], "cramming": [1e-3, 1e-3]}


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_flag_overrides_the_recipe(recipe, name):
    given = with_flags(PretrainOptions(recipe=recipe), **{name: OTHER[name]})
    assert get(resolve(given, has_gpu=False), name) == OTHER[name]


def test_the_cramming_recipe_is_the_papers():
    options = resolve(PretrainOptions(recipe="cramming"), has_gpu=True)
    batches, optimizer = options.batches, options.optimizer
    settings = {"optimizer": "adamw", "lr": 1e-3, "beta1": 0.9, "beta2": 0.98, "adam_eps": 1e-12}
    assert optimizer == OptimizerOptions(**settings, weight_decay=0.01, clip=0.5)
    assert (batches.batch_size, batches.batch_ramp, batches.mask_rate) == (8192, 0.6, 0.25)
    assert (batches.layout, batches.order, batches.max_length) == ("packed", "full-stops", 128)
    assert RECIPES["cramming"].schedule == "triangle"
    text = options.text
    assert (text.max_tokens_per_char, text.lowercase, text.strip_accents, text.ascii_only) == (0.25, True, True, True)
    assert PRESETS["crammed-bert"].vocab_size == 32_768


def test_only_the_recipes_own_batch_is_ramped_up_to():
    given = with_flags(PretrainOptions(recipe="cramming"), batch_size=1024)
    assert resolve(given, has_gpu=True).batches.batch_ramp == 0
    assert resolve(with_flags(given, batch_ramp=0.6), has_gpu=True).batches.batch_ramp == 0.6


IMPOSSIBLE = [
    ("--max-length", PretrainOptions(batches=BatchOptions(max_length=1))),
    ("--max-length", PretrainOptions(batches=BatchOptions(max_length=513))),
    ("--mask-rate", PretrainOptions(batches=BatchOptions(mask_rate=0.0))),
    ("--mask-rate", PretrainOptions(batches=BatchOptions(mask_rate=1.0))),
    ("--mask-rate", PretrainOptions(batches=BatchOptions(mask_rate=math.nan))),
    ("--batch-ramp", PretrainOptions(batches=BatchOptions(batch_ramp=-0.1))),
    ("--batch-ramp", PretrainOptions(batches=BatchOptions(batch_ramp=1.1))),
    ("--batch-size", PretrainOptions(batches=BatchOptions(batch_size=0))),
    ("--microbatch-size", PretrainOptions(batches=BatchOptions(microbatch_size=-4))),
    ("--order", PretrainOptions(batches=BatchOptions(layout="documents", order="full-stops"))),
    ("--heldout-fraction", PretrainOptions(text=TextOptions(heldout_fraction=0.0))),
    ("--heldout-fraction", PretrainOptions(text=TextOptions(heldout_fraction=1.0))),
    ("--max-tokens-per-char", PretrainOptions(text=TextOptions(max_tokens_per_char=0.0))),
    ("--vocab-size", PretrainOptions(text=TextOptions(vocab_size=255))),
    ("--lr", PretrainOptions(optimizer=OptimizerOptions(lr=0.0))),
    ("--lr", PretrainOptions(optimizer=OptimizerOptions(lr=math.nan))),
    ("--lr", PretrainOptions(optimizer=OptimizerOptions(lr=math.inf))),
    ("--clip", PretrainOptions(optimizer=OptimizerOptions(clip=0.0))),
    ("--weight-decay", PretrainOptions(optimizer=OptimizerOptions(weight_decay=-0.01))),
    ("--weight-decay", PretrainOptions(optimizer=OptimizerOptions(weight_decay=math.inf))),
    ("--beta1", PretrainOptions(optimizer=OptimizerOptions(beta1=1.0))),
    ("--beta2", PretrainOptions(optimizer=OptimizerOptions(beta2=-0.1))),
    ("--adam-eps", PretrainOptions(optimizer=OptimizerOptions(adam_eps=-1e-12))),
    ("--seed", PretrainOptions(seed=-1)),
    ("--seed", PretrainOptions(seed=2**64)),
    ("--evals", PretrainOptions(evals=0)),
    ("--keep-checkpoints", PretrainOptions(run=RunOptions(keep_checkpoints=0))),
    ("--checkpoint-every", PretrainOptions(run=RunOptions(checkpoint_every="10"))),
    ("--log-every", PretrainOptions(run=RunOptions(log_every="often"))),
    ("--budget", PretrainOptions(budget="a day")),
]


@pytest.mark.parametrize(("flag", "options"), IMPOSSIBLE)
def test_impossible_settings_are_refused_in_one_line_that_names_the_flag(flag, options):
    with pytest.raises(UserError) as error:
        resolve(options, has_gpu=False)
    assert f"{flag} " in one_line(error)


@pytest.mark.parametrize(
    "options",
    [
        PretrainOptions(batches=BatchOptions(max_length=2)),
        PretrainOptions(batches=BatchOptions(max_length=512)),
        PretrainOptions(batches=BatchOptions(batch_ramp=1.0, batch_size=1, microbatch_size=1)),
        PretrainOptions(batches=BatchOptions(layout="packed", order="full-stops")),
        PretrainOptions(optimizer=OptimizerOptions(weight_decay=0.0, beta1=0.0)),
        PretrainOptions(text=TextOptions(vocab_size=256)),
        PretrainOptions(evals=1, run=RunOptions(keep_checkpoints=1, out=Path("x"))),
    ],
)
def test_the_limits_themselves_are_allowed(options):
    assert resolve(options, has_gpu=False).preset == "cramfast-tiny"


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("24h", 86_400, "seconds"),
        ("10m", 600, "seconds"),
        ("90s", 90, "seconds"),
        ("1.5d", 129_600, "seconds"),
        ("2min", 120, "seconds"),
        (" 10 M ", 600, "seconds"),
        ("5e9tokens", 5e9, "tokens"),
        ("1token", 1, "tokens"),
        ("2e17flops", 2e17, "flops"),
        ("2E+17FLOPS", 2e17, "flops"),
    ],
)
def test_budgets(text, amount, unit):
    assert Budget.parse(text) == Budget(amount, unit)


@pytest.mark.parametrize(
    "text",
    ["", "10", "h", "-5m", "0s", "0tokens", "5e9", "1.2.3h", "24hours", "5 parsecs", "10steps", "nans", "1e999tokens"],
)
def test_bad_budgets_name_the_flag_and_show_good_ones(text):
    with pytest.raises(UserError, match=r"24h.*5e9tokens.*2e17flops") as error:
        Budget.parse(text)
    assert one_line(error).startswith(f"--budget {text}")


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("30s", 30, "seconds"), ("10m", 600, "seconds"), ("1.5h", 5400, "seconds"), ("500steps", 500, "steps")],
)
def test_intervals(text, amount, unit):
    assert Interval.parse("--log-every", text) == Interval(amount, unit)


@pytest.mark.parametrize("text", ["", "500", "steps", "0steps", "-1s", "5e9tokens", "2e17flops"])
def test_bad_intervals_name_the_flag_and_show_good_ones(text):
    with pytest.raises(UserError, match=r"30s.*500steps") as error:
        Interval.parse("--log-every", text)
    assert one_line(error).startswith(f"--log-every {text}")
