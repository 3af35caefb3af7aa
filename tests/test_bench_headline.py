"""The README's first lines of numbers come from the results."""

from bench.headline import headline
from bench.ledger import Device, Module, Record

STEP, ACCELERATED = "step/train/crammed-bert-512x128", "accelerate/train/glue-mnli"


def record(work, who, seconds):
    return Record(work, who, "bfloat16", seconds, tokens_per_s=1e4 / seconds)


def device_of(*records, glue=None):
    return Device("card", {"step": Module("step", {"device": "Card 5"}, records)}, glue)


def row(*accuracies):
    seeds = {str(seed): {"scores": {"dev": {"accuracy": share}}} for seed, share in enumerate(accuracies)}
    return {"tasks": {"sst2": {"seeds": seeds}}}


def test_speeds_stand_beside_whoever_was_measured():
    records = (
        record(STEP, "cramfast", 0.08),
        record(STEP, "plain-compile", 0.1),
        record(ACCELERATED, "cramfast", 0.02),
        record(ACCELERATED, "hf-eager", 0.05),
    )
    said = headline([device_of(*records)]).splitlines()
    assert said[0] == "Measured on one Card 5:"
    assert said[2].endswith("512 × 128: 125,000 tokens/s, 1.25 times as fast as plain PyTorch under torch.compile")
    assert said[3].endswith("`cramfast.accelerate`: 500,000 tokens/s, 2.50 times as fast as without")
    assert len(said) == 4


def test_scores_are_medians_of_what_was_finetuned():
    glue = {"rows": {"pretrained": row(0.9, 0.8, 0.85), "random weights": row(0.7)}}
    assert headline([device_of(glue=glue)]).endswith("(of random weights): SST-2 85.0 (70.0)")
    del glue["rows"]["random weights"]
    assert headline([device_of(glue=glue)]).endswith(": SST-2 85.0")


def test_a_card_of_which_only_scores_are_known():
    glue = {"environment": {"device": "Card 6"}, "rows": {"pretrained": row(0.9)}}
    assert headline([Device("card", {}, glue)]).startswith("Measured on one Card 6:\n\n- GLUE")


def test_of_nothing_there_is_nothing_to_say():
    assert headline([device_of(record("gelu/fwd/1x1", "cramfast", 1.0))]) == "Nothing measured yet."
    assert headline([]) == "Nothing measured yet."
