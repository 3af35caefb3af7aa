"""BERT and ModernBERT as Hugging Face's transformers trains them: padded batches, a head over every token.

B sequences padded to S tokens. Dropout is off, attention is the library's default.
"""

import torch
from torch import nn

from cramfast.config import ModelConfig
from cramfast.data.random_words import special_ids_of
from cramfast.hugging_face import write_config, write_weights

from .steps import INITIAL_SEED, MaskedBatch, Ordinary, initial_bert

_NOT_PREDICTED = -100
# Of ModernBERT's layers every third sees all tokens, the others those at most this many places away.
_GLOBAL_EVERY = 3
_WINDOW = 64

MODERNBERT_BASE = ModelConfig(
    vocab_size=50_368, hidden_size=768, num_layers=22, num_heads=12, intermediate_size=1152, max_positions=8192
)


def bert_settings(config: ModelConfig, dropout: float) -> dict[str, object]:
    """Arguments of transformers' BertConfig for a model of this size."""
    settings = write_config(config, special_ids_of(config.vocab_size))
    return settings | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}


def hf_bert(config: ModelConfig) -> nn.Module:
    """BertForMaskedLM with the weights that this project's model starts from."""
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig(**bert_settings(config, dropout=0.0)))
    weights = write_weights(initial_bert(config).state_dict(), config)
    # The decoder shares both of its parameters, under names of its own.
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    model.load_state_dict(weights)
    return model


def hf_modernbert(config: ModelConfig) -> nn.Module:
    """ModernBertForMaskedLM of this size, its weights random; every third layer global, windows as in the original."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    torch.manual_seed(INITIAL_SEED)
    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_positions,
            local_attention=2 * _WINDOW,
            global_attn_every_n_layers=_GLOBAL_EVERY,
            # Special tokens, of which a benchmark's batch has none.
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        )
    )


def padded_arguments(batch: MaskedBatch) -> dict[str, torch.Tensor]:
    """Ids, labels and, where there is padding, the mask of the real tokens, int64 (B, S) each."""
    counts = batch.cu_seqlens.diff()
    real = torch.arange(batch.max_seqlen, device=counts.device) < counts[:, None]
    flat_labels = torch.full_like(batch.masked_ids, _NOT_PREDICTED).index_copy(0, batch.positions, batch.labels)
    ids, labels = torch.zeros_like(real, dtype=torch.int64), torch.full_like(real, _NOT_PREDICTED, dtype=torch.int64)
    ids[real], labels[real] = batch.masked_ids, flat_labels
    mask = {} if bool(real.all()) else {"attention_mask": real.long()}
    return {"input_ids": ids, "labels": labels} | mask


def _windowed(counts: torch.Tensor, config: ModelConfig) -> float:
    """Mean number of tokens that a token of these sequences attends to in a layer of ModernBERT."""
    local = sum(min(n, i + _WINDOW + 1) - max(0, i - _WINDOW) for n in counts.tolist() for i in range(n))
    global_layers = -(-config.num_layers // _GLOBAL_EVERY)
    pairs = global_layers * int(counts.square().sum()) + (config.num_layers - global_layers) * local
    return pairs / config.num_layers / int(counts.sum())


_TRANSFORMERS = {"modules": ("transformers",), "package": "transformers"}
HF_BERT = Ordinary("hf", hf_bert, padded_arguments, **_TRANSFORMERS)
HF_MODERNBERT = Ordinary("hf", hf_modernbert, padded_arguments, mean_attended=_windowed, **_TRANSFORMERS)
