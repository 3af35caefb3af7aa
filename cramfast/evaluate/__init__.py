"""Measuring a model: held-out loss, accuracy and examples."""
