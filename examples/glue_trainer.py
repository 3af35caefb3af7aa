"""A task of GLUE, or one like it, with Hugging Face's Trainer on this project's kernels.

    python examples/glue_trainer.py --model bert-base-uncased --train train.jsonl --dev dev.jsonl

A line of a file: {"sentence1": "...", "sentence2": "...", "label": 0}; sentence2 may be missing. Needs `accelerate`,
as the Trainer does.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import cramfast


def read(path: Path, tokenizer, length: int) -> list[dict]:
    """Rows of a file, tokenized and not padded: the collator pads each batch to its longest."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        encoded = tokenizer(row["sentence1"], row.get("sentence2"), truncation=True, max_length=length)
        rows.append({**encoded, "label": row["label"]})
    return rows


def accuracy(evaluated) -> dict[str, float]:
    return {"accuracy": float(np.mean(evaluated.predictions.argmax(-1) == evaluated.label_ids))}


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Finetune and evaluate; returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a name on the hub, or a folder")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/glue"))
    parser.add_argument("--length", type=int, default=128, help="the most tokens of a row")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, dev = (read(path, tokenizer, options.length) for path in (options.train, options.dev))
    labels = 1 + max(row["label"] for row in train)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=labels)
    print(cramfast.accelerate(model))

    settings = TrainingArguments(
        output_dir=str(options.out),
        per_device_train_batch_size=options.batch,
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        bf16=True,
        use_cpu=options.cpu,
        save_strategy="no",
        report_to=[],
    )
    trainer = Trainer(
        model,
        settings,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=dev,
        compute_metrics=accuracy,
    )
    trainer.train()
    metrics = trainer.evaluate()
    # A stock model: transformers loads it anywhere, with or without this project.
    trainer.save_model()
    print(metrics)
    return metrics


if __name__ == "__main__":
    main()
