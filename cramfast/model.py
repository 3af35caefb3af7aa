"""The thin BERT: one module for the three families of `config.PRESETS`.

Shapes: T tokens of an unpadded batch, C hidden size, D head size, M predictions, V vocabulary, P positions.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .config import Activations, ModelConfig
from .kernels import embed, sequence_positions
from .layers import (
    FusedAddLayerNorm,
    FusedGEGLU,
    FusedGELU,
    FusedLayerNorm,
    FusedLinear,
    SparseMLMHead,
    UnpaddedSelfAttention,
    only,
)


class Embeddings(nn.Module):
    """Token (+ position, + token type) embeddings and their LayerNorm: ids (T,) → (T, C)."""

    dropout = 0.0

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = FusedLayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)
        self.positions = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        elif config.positions == "sinusoidal":
            self.positions = ScaledSinusoid(config.max_positions, config.hidden_size)
        self.token_types = nn.Embedding(config.token_types, config.hidden_size) if config.token_types else None

    def forward(
        self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor, token_types: torch.Tensor | None = None
    ) -> torch.Tensor:
        position_ids = position_weight = position_scale = None
        if self.positions is not None:
            _, position_ids = sequence_positions(cu_seqlens, input_ids.numel())
            if self.token_types is None and isinstance(self.positions, ScaledSinusoid):
                position_weight, position_scale = self.positions.table, self.positions.scale
            else:
                position_weight = self.positions.weight
            if token_types is not None:
                # One table of all sums of a type's row and a position's, type by type.
                position_ids = position_ids + len(position_weight) * token_types
                position_weight = (self.token_types.weight[:, None] + position_weight).flatten(0, 1)
            elif self.token_types is not None:
                # Pretraining has one token type; its row rides on every position row.
                position_weight = position_weight + self.token_types.weight[0]
        embedded = embed(
            input_ids,
            self.tokens.weight,
            self.norm.weight,
            self.norm.bias,
            position_ids=position_ids,
            position_weight=position_weight,
            position_scale=position_scale,
            eps=self.norm.eps,
            dtype=activation_dtype(self.tokens.weight),
        )
        return _dropped(embedded, self)


class ScaledSinusoid(nn.Module):
    """Fixed sinusoidal positions (P, C) times one learned scalar that starts at 1/sqrt(C).

    Source: the positions of Vaswani et al., 1706.03762, scaled as in Hua et al., 2202.10447.
    """

    def __init__(self, positions: int, hidden_size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([hidden_size**-0.5]))
        cos, sin = rotary_tables(positions, hidden_size, 10_000.0)
        self.register_buffer("table", torch.stack((sin, cos), dim=-1).flatten(1), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.scale * self.table


class FeedForward(nn.Sequential):
    """(T, C) → (T, I) or, for GEGLU, (T, 2I) → activation → (T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__(
            FusedLinear(config.hidden_size, config.wide_size, config.linear_bias),
            FusedGEGLU() if config.activation == "geglu" else FusedGELU(),
            FusedLinear(config.intermediate_size, config.hidden_size, config.linear_bias),
        )

    def forward(self, x: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        """recompute: GEGLU's output is not saved."""
        wide, activation, narrow = self
        if isinstance(activation, FusedGEGLU):
            return activation.then(narrow, wide(x), recompute)
        return narrow(activation(wide(x)))

    def after(
        self, norm: FusedAddLayerNorm, x: torch.Tensor, residual: torch.Tensor, recompute: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, residual) → (self(norm(x + residual)), x + residual). recompute: nor is the norm's."""
        wide, activation, narrow = self
        if isinstance(activation, FusedGEGLU):
            return activation.between(norm, wide, narrow, x, residual, recompute)
        x, residual = norm.then(wide, x, residual, recompute)
        return narrow(activation(x)), residual


class PreNormLayer(nn.Module):
    """x → x + attention(norm(x)), then the same with the feed-forward network.

    Takes and returns `(x, residual)`: the last block's output and the stream it has not been added to yet, so that each
    addition happens inside the norm that follows it.
    """

    dropout = 0.0

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        without_norm = number == 0 and not config.first_norm
        self.attention_norm = None if without_norm else _add_norm(config)
        self.attention = _attention(config, number)
        self.mlp_norm = _add_norm(config)
        self.mlp = FeedForward(config)

    def forward(self, x, residual, sequences, rows=None, recompute=False):
        if self.attention_norm is None:
            qkv, residual = self.attention.qkv(x), x
        else:
            qkv, residual = self.attention_norm.then(self.attention.qkv, x, residual, recompute)
        x = _dropped(self.attention.attend(qkv, *sequences, rows=rows), self)
        x, residual = self.mlp.after(self.mlp_norm, x, only(residual, rows), recompute)
        return _dropped(x, self), residual


class PostNormLayer(nn.Module):
    """x → norm(x + attention(x)), then the same with the feed-forward network, as the original BERT."""

    dropout = 0.0

    def __init__(self, config: ModelConfig, number: int):
        super().__init__()
        self.attention = _attention(config, number)
        self.attention_norm = _add_norm(config)
        self.mlp = FeedForward(config)
        self.mlp_norm = _add_norm(config)

    def forward(self, x, residual, sequences, rows=None, recompute=False):
        attended = _dropped(self.attention(x, *sequences, rows=rows), self)
        x, _ = self.attention_norm(attended, only(x, rows))
        x, _ = self.mlp_norm(_dropped(self.mlp(x, recompute), self), x)
        return x, None


class Bert(nn.Module):
    """A BERT-class encoder with a tied masked-language-modelling head.

    sparse_last_layer: whether the loss has the last layer compute the predicted tokens alone. What the others would
    come to reaches no loss, so only the rounding of sums differs. memory: "fast", or "low" for a loss that takes
    less memory and more time; `SparseMLMHead` says how much.

    activations: what the layers save for the backward pass, where weights have a `main_grad`: all that it reads
    ("keep"); not the outputs of norms and activation functions, which it writes once more ("lean"); or nothing but
    their input, so that it repeats them ("layers").

    dropout: the share dropped in training from the embedding, the attention weights and each block's output; it can be
    set later as well. On a GPU, "layers" with dropout cannot run as a CUDA graph.
    """

    def __init__(
        self,
        config: ModelConfig,
        sparse_last_layer: bool = True,
        memory: str = "fast",
        activations: Activations = "keep",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.config = config
        self.sparse_last_layer = sparse_last_layer
        self.activations = activations
        self.embeddings = Embeddings(config)
        layer = PreNormLayer if config.norm == "pre" else PostNormLayer
        self.layers = nn.ModuleList(layer(config, number) for number in range(config.num_layers))
        self.final_norm = _add_norm(config) if config.norm == "pre" else None
        self.head = SparseMLMHead(
            config.hidden_size,
            config.vocab_size,
            transform=config.head_transform,
            linear_bias=config.linear_bias,
            norm_bias=config.norm_bias,
            decoder_bias=config.decoder_bias,
            eps=config.norm_eps,
            memory=memory,
        )
        self._add_tables("", config.rope_theta if config.positions == "rotary" else None)
        local = config.positions == "rotary" and config.window is not None
        self._add_tables("local_", config.local_rope_theta if local else None)
        self.dropout = dropout
        self.apply(self._initialise)

    def _add_tables(self, prefix: str, theta: float | None) -> None:
        """Buffers `cos` and `sin`, their names after `prefix`; None without theta."""
        tables = (None, None)
        if theta is not None:
            tables = rotary_tables(self.config.max_positions, self.config.head_size, theta)
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(prefix + name, table, persistent=False)

    @property
    def dropout(self) -> float:
        return self.embeddings.dropout

    @dropout.setter
    def dropout(self, share: float) -> None:
        if not 0.0 <= share < 1.0:
            raise ValueError(f"Bert: dropout is {share}, expected at least 0 and below 1")
        self.embeddings.dropout = share
        for layer in self.layers:
            layer.dropout = layer.attention.dropout = share

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def encode(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        rows: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (T, C) of input_ids (T,), the sequences cu_seqlens (B+1,) marks, none above max_seqlen.

        With `rows` (M,), indices of tokens, those (M, C) of these alone; the last layer then leaves the others out of
        all that follows its attention. token_types: int64 (T,), None for all 0; ValueError where the model has none.
        """
        if token_types is not None:
            self._expect_token_types(token_types, input_ids, max_seqlen)
        x, residual = self.embeddings(input_ids, cu_seqlens, token_types), None
        everywhere = (cu_seqlens, max_seqlen, self.cos, self.sin)
        nearby = (cu_seqlens, max_seqlen, self.local_cos, self.local_sin)
        # What the backward pass repeats has to drop the same again.
        repeated = {"use_reentrant": False, "preserve_rng_state": self.training and self.dropout > 0}
        for layer in self.layers:
            sequences = everywhere if layer.attention.window is None else nearby
            arguments = (x, residual, sequences, rows if layer is self.layers[-1] else None)
            if self.activations == "layers" and torch.is_grad_enabled():
                x, residual = checkpoint(layer, *arguments, **repeated)
            else:
                x, residual = layer(*arguments, recompute=self.activations == "lean")
        return x if self.final_norm is None else self.final_norm(x, residual)[0]

    def _expect_token_types(self, token_types: torch.Tensor, input_ids: torch.Tensor, max_seqlen: int) -> None:
        if not self.config.token_types:
            raise ValueError("Bert.encode: token_types are given, but the model has none (config.token_types is 0)")
        if token_types.shape != input_ids.shape or token_types.dtype not in (torch.int32, torch.int64):
            found = f"{token_types.dtype} of {tuple(token_types.shape)}"
            raise ValueError(f"Bert.encode: token_types are {found}, expected int64 of {tuple(input_ids.shape)}")
        if max_seqlen > self.config.max_positions:
            # A place past the last one of a type would be the first one of the next.
            places = self.config.max_positions
            raise ValueError(f"Bert.encode: max_seqlen is {max_seqlen}, the model has {places} places")

    def forward(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        positions: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Mean loss, in nats, of predicting labels (M,) at positions (M,) of the flat batch."""
        return self.head(*self._predictions(input_ids, cu_seqlens, max_seqlen, positions, labels))

    @torch.no_grad()
    def score(
        self,
        input_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        positions: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(losses, correct)` of predicting labels (M,) at positions (M,) of the flat batch, without gradients.

        losses: (M,), in nats, 0 where the label is −100. correct: bool (M,), whether the label is the likeliest token.
        """
        return self.head.score(*self._predictions(input_ids, cu_seqlens, max_seqlen, positions, labels))

    def _predictions(self, input_ids, cu_seqlens, max_seqlen, positions, labels):
        """What the head takes."""
        decoder = self.embeddings.tokens.weight
        if self.sparse_last_layer:
            return self.encode(input_ids, cu_seqlens, max_seqlen, positions), decoder, labels
        return self.encode(input_ids, cu_seqlens, max_seqlen), decoder, labels, positions

    def predict(self, hidden_rows: torch.Tensor) -> torch.Tensor:
        """Logits (M, V) of rows (M, C) of `encode`'s output."""
        return self.head.predict(hidden_rows, self.embeddings.tokens.weight)


def rotary_tables(
    positions: int, size: int, theta: float, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (positions, size/2) of position · theta^(−2i/size), fp32."""
    frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    angle = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def _dropped(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """x, of which `module.dropout` is zeroed and the rest scaled up in training; x itself where that is 0."""
    return nn.functional.dropout(x, module.dropout) if module.training and module.dropout else x


def _attention(config: ModelConfig, number: int) -> UnpaddedSelfAttention:
    """That of layer `number`."""
    window = config.window if config.is_local(number) else None
    return UnpaddedSelfAttention(config.hidden_size, config.num_heads, config.linear_bias, window=window)


def _add_norm(config: ModelConfig) -> FusedAddLayerNorm:
    return FusedAddLayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)


def activation_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype activations have: autocast's inside autocast, else the weights'."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
