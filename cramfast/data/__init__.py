"""Text in, unpadded batches out: sources, tokenizer, shards, batches."""
