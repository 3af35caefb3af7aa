"""GPU operators of cramfast, imported as `cramfast.kernels`.

This folder knows tensors, never models or configs, and needs torch and triton alone. Each file holds one
operator family: its reference in plain PyTorch and its public function.
"""

# transformers looks for an unrelated package named `kernels` and finds this folder when Python runs in the
# root of a clone. The version answers "too old to use"; nothing is registered under that second name.
__version__ = "0"

if __name__ == "cramfast.kernels":
    from .adamw import adamw, adamw_rates, adamw_reference, update_rates, update_rates_reference
    from .attention import varlen_attention, varlen_attention_reference
    from .attention_settings import LONGEST
    from .column_sums import column_sums, column_sums_reference
    from .dispatch import OPERATORS, choose
    from .embed import embed, embed_reference
    from .gelu import geglu, geglu_reference, gelu, gelu_reference
    from .launch import Launch, compiling_ahead, every_launch
    from .layer_norm import add_layer_norm, add_layer_norm_reference, layer_norm, layer_norm_reference
    from .linear import add_layer_norm_geglu_linear, add_layer_norm_linear, geglu_linear, linear
    from .long_attention import choose_long
    from .mask_tokens import mask_tokens, mask_tokens_reference
    from .mlm_loss import mlm_loss, mlm_loss_reference, mlm_scores, mlm_scores_reference
    from .muon import muon_direction, muon_direction_reference, muon_update, muon_update_reference
    from .operator import expect_first_derivative
    from .orthogonalise import orthogonalise, orthogonalise_reference
    from .padding import pad, unpad
    from .select_rows import select_rows, select_rows_reference
    from .selftest import Finding, selftest
    from .sequences import group_sequences, sequence_positions
    from .tape import Nodes, Pass, Tape, one_node, tape_serves

    __all__ = [
        "LONGEST",
        "OPERATORS",
        "Finding",
        "Launch",
        "Nodes",
        "Pass",
        "Tape",
        "adamw",
        "adamw_rates",
        "adamw_reference",
        "add_layer_norm",
        "add_layer_norm_geglu_linear",
        "add_layer_norm_linear",
        "add_layer_norm_reference",
        "choose",
        "choose_long",
        "column_sums",
        "column_sums_reference",
        "compiling_ahead",
        "embed",
        "embed_reference",
        "every_launch",
        "expect_first_derivative",
        "geglu",
        "geglu_linear",
        "geglu_reference",
        "gelu",
        "gelu_reference",
        "group_sequences",
        "layer_norm",
        "layer_norm_reference",
        "linear",
        "mask_tokens",
        "mask_tokens_reference",
        "mlm_loss",
        "mlm_loss_reference",
        "mlm_scores",
        "mlm_scores_reference",
        "muon_direction",
        "muon_direction_reference",
        "muon_update",
        "muon_update_reference",
        "one_node",
        "orthogonalise",
        "orthogonalise_reference",
        "pad",
        "select_rows",
        "select_rows_reference",
        "selftest",
        "sequence_positions",
        "tape_serves",
        "unpad",
        "update_rates",
        "update_rates_reference",
        "varlen_attention",
        "varlen_attention_reference",
    ]
