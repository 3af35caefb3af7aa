"""Downstream tasks: finetuning an encoder on GLUE or on data of one's own."""
