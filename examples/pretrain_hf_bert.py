"""Masked-language-modelling steps of Hugging Face's BERT on this project's kernels: one line more than without.

    python examples/pretrain_hf_bert.py                                    BERT-base on the GPU
    python examples/pretrain_hf_bert.py --layers 2 --hidden 64 --steps 3   a tiny one, also on a CPU
    python examples/pretrain_hf_bert.py --untouched                        without the one line, to compare

The tokens are random; a loader of your own goes where `random_batch` is.
"""

import argparse
import time

import torch
from transformers import BertConfig, BertForMaskedLM

import cramfast

MASK_ID, FIRST_ORDINARY, MASK_RATE, NOT_PREDICTED = 103, 999, 0.15, -100


def random_batch(config: BertConfig, sequences: int, longest: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Sequences of 16 to `longest` tokens, padded to (sequences, longest) as a data collator does it."""
    lengths = torch.randint(min(16, longest), longest + 1, (sequences, 1), device=device)
    mask = torch.arange(longest, device=device) < lengths
    ids = torch.randint(FIRST_ORDINARY, config.vocab_size, mask.shape, device=device)
    hidden = (torch.rand(mask.shape, device=device) < MASK_RATE) & mask
    return {
        "input_ids": ids.masked_fill(hidden, MASK_ID).masked_fill(~mask, config.pad_token_id),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~hidden, NOT_PREDICTED),
    }


def main(argv: list[str] | None = None) -> float:
    """Train; returns the last loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="sequences of a step")
    parser.add_argument("--length", type=int, default=128, help="places of a sequence")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--untouched", action="store_true", help="the model as transformers has it")
    options = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = BertConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.hidden // 64, 1),
        intermediate_size=4 * options.hidden,
    )
    model = BertForMaskedLM(config).to(device).train()
    if not options.untouched:
        print(cramfast.accelerate(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    for step in range(1, options.steps + 1):
        start, batch = time.perf_counter(), random_batch(config, options.batch, options.length, device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens_per_s = int(batch["attention_mask"].sum()) / (time.perf_counter() - start)
        print(f"step {step}  loss {loss.item():.3f}  {tokens_per_s:,.0f} tokens/s")
    return loss.item()


if __name__ == "__main__":
    main()
