"""GPU operators of cramfast, imported as `cramfast.kernels`.

This folder knows tensors, never models or configs, and needs torch and triton alone. Each file holds one
operator family: its reference in plain PyTorch and its public function.
"""

# transformers looks for an unrelated package named `kernels` and finds this folder when Python runs in the
# root of a clone. The version answers "too old to use"; nothing is registered under that second name.
__version__ = "0"

if __name__ == "cramfast.kernels":
    from .attention import varlen_attention, varlen_attention_reference
    from .dispatch import OPERATORS, choose
    from .embed import embed, embed_reference
    from .gelu import geglu, geglu_reference, gelu, gelu_reference
    from .launch import Launch, every_launch
    from .layer_norm import add_layer_norm, add_layer_norm_reference, layer_norm, layer_norm_reference
    from .mask_tokens import mask_tokens, mask_tokens_reference
    from .mlm_loss import mlm_loss, mlm_loss_reference
    from .selftest import Finding, selftest
    from .sequences import sequence_positions

    __all__ = [
        "OPERATORS",
        "Finding",
        "Launch",
        "add_layer_norm",
        "add_layer_norm_reference",
        "choose",
        "embed",
        "embed_reference",
        "every_launch",
        "geglu",
        "geglu_reference",
        "gelu",
        "gelu_reference",
        "layer_norm",
        "layer_norm_reference",
        "mask_tokens",
        "mask_tokens_reference",
        "mlm_loss",
        "mlm_loss_reference",
        "selftest",
        "sequence_positions",
        "varlen_attention",
        "varlen_attention_reference",
    ]
