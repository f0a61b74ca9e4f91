"""A small GPT (Radford et al., 2019): a chain of blocks, each of which is a place for a cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys.errors import ConfigError
from fedsys.models.blocks import check_positive, check_probability


class Embedding(nn.Module):
    """What stands for a token, and for its place.

    Args:
        vocabulary: Tokens that there are.
        length: Places.
        width: Numbers for each.
    """

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.zeros(length, width))
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.place, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(batch, length, width)`` of tokens ``(batch, length)``."""
        embedded: Tensor = self.token(tokens)
        return embedded + self.place


class CausalAttention(nn.Module):
    """Attention of each place to itself and those before it, in several heads.

    Args:
        width: Of a token.
        heads: Parts of it, each with its own attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.each = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`, ``(batch, length, width)``."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, self.each)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a perceptron, each on normalised tokens and added to what came in.

    Args:
        width: Of a token.
        heads: Of the attention.
        dropout: Probability of dropping an activation while training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`, ``(batch, length, width)``."""
        x = x + self.drop1(self.attention(self.norm1(x)))
        mixed: Tensor = self.drop2(self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return x + mixed


class Gpt(nn.Module):
    """Embedding, blocks, and a score for each token that may come next.

    Args:
        input_shape: ``(length,)``.
        num_classes: Tokens that there are.
        width: Of a token.
        depth: Number of blocks.
        heads: Of each attention.
        dropout: Probability of dropping an activation while training.

    Raises:
        ConfigError: The width is no multiple of the heads, `dropout` no probability, or examples
            are no sequences of tokens.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("depth", depth), ("heads", heads)):
            check_positive(f"model.{name}", value)
        check_probability("model.dropout", dropout)
        if width % heads:
            raise ConfigError.of("model.width", width, f"must be a multiple of heads={heads}")
        if len(input_shape) != 1:
            raise ConfigError.of(
                "model", "gpt", f"takes sequences of tokens, not examples of {input_shape}",
                "data=text task=next_token",
            )  # fmt: skip
        self.embedding = Embedding(num_classes, input_shape[0], width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores ``(batch, length, vocabulary)`` of tokens ``(batch, length)``."""
        scores: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return scores
