"""Hugging Face's BERT untouched and after `cramfast.accelerate`: the same weights, the same loop, the same batches."""

from dataclasses import replace

import torch
from torch import nn

import cramfast
from cramfast.config import ModelConfig

from .finetuning import OUTPUTS, FinetunePeer, FinetuneTraining, TrainerPass
from .hugging_face import HF_BERT, bert_settings, hf_bert
from .peers import CRAMFAST
from .steps import INITIAL_SEED, OrdinaryStep, StepPeer, Training, ordinary_peers

OPERATOR = "accelerate"


def bert_classifier(config: ModelConfig, dropout: float) -> nn.Module:
    """BertForSequenceClassification of this size, its weights random."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(INITIAL_SEED)
    return BertForSequenceClassification(BertConfig(**bert_settings(config, dropout), num_labels=OUTPUTS))


def accelerated(model: nn.Module) -> nn.Module:
    cramfast.accelerate(model)
    return model


def _step(training: Training) -> OrdinaryStep:
    ordinary = replace(HF_BERT, build=lambda config: accelerated(hf_bert(config)))
    return OrdinaryStep(replace(training, work=replace(training.work, ordinary=ordinary)), compiled=False)


def _pass(training: FinetuneTraining) -> TrainerPass:
    work = replace(training.work, build=lambda config, dropout: accelerated(bert_classifier(config, dropout)))
    return TrainerPass(replace(training, work=work))


STEP_PEERS = (StepPeer(CRAMFAST.who, _step), ordinary_peers(HF_BERT)[0])
FINETUNE_PEERS = tuple(
    FinetunePeer(who, start, modules=("transformers",))
    for who, start in ((CRAMFAST.who, _pass), ("hf-eager", TrainerPass))
)
