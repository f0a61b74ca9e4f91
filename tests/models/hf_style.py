"""Small transformers written as those of Hugging Face are: lists of layers, sizes, tuples, masks.

They are no copies: what is taken over is how such models pass tensors on, which is what tracing
and cutting have to follow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.own_work import MaskedBlock


class SelfAttention(nn.Module):
    """Attention with separate layers for query, key and value, and a mask that is added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.dropout = nn.Linear(width, width), nn.Dropout(0.1)

    def _heads(self, x: Tensor) -> Tensor:
        shape = x.size()[:-1] + (self.num_attention_heads, self.attention_head_size)  # noqa: RUF005
        return x.view(shape).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        """Return the mixed states in a tuple."""
        query = self._heads(self.query(hidden_states))
        key, value = self._heads(self.key(hidden_states)), self._heads(self.value(hidden_states))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(self.attention_head_size)
        if attention_mask is not None:
            scores = scores + attention_mask
        mixed = torch.matmul(self.dropout(nn.functional.softmax(scores, dim=-1)), value)
        mixed = mixed.permute(0, 2, 1, 3).contiguous()
        all_heads = self.num_attention_heads * self.attention_head_size
        return (mixed.view(mixed.size()[:-2] + (all_heads,)),)  # noqa: RUF005


class Output(nn.Module):
    """A layer, dropout, and the norm of a sum with what came in."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, width), nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return normalised states."""
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertLayer(nn.Module):
    """Attention and a perceptron; returns a tuple, as layers do that may return more."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.attention_output = SelfAttention(width, heads), Output(width, width)
        self.intermediate, self.output = nn.Linear(width, 2 * width), Output(2 * width, width)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Return the states, and what else attention returned."""
        mixed = self.attention(hidden_states, attention_mask)
        attended = self.attention_output(mixed[0], hidden_states)
        inner = nn.functional.gelu(self.intermediate(attended))
        return (self.output(inner, attended), *mixed[1:])


class Bert(nn.Module):
    """Words, kinds and places, layers, and a class by the first word."""

    def __init__(self, num_classes: int, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(20, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(16, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm, self.dropout = nn.LayerNorm(width, eps=1e-12), nn.Dropout(0.1)
        self.register_buffer("position_ids", torch.arange(16).expand((1, -1)), persistent=False)
        self.layer = nn.ModuleList([BertLayer(width, 2) for _ in range(depth)])
        self.pooler, self.classifier = nn.Linear(width, width), nn.Linear(width, num_classes)

    def forward(
        self, input_ids: Tensor, padding: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return scores ``(batch, classes)`` of words and where there are none."""
        seq_length = input_ids.size()[1]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = x + self.position_embeddings(self.position_ids[:, :seq_length])
        hidden_states = self.dropout(self.LayerNorm(x))
        extended = padding[:, None, None, :].to(torch.float32) * torch.finfo(torch.float32).min
        for layer_module in self.layer:
            hidden_states = layer_module(hidden_states, extended)[0]
        return self.classifier(torch.tanh(self.pooler(hidden_states[:, 0])))


class Sized(nn.Module):
    """A mask that is made once, of the sizes of states, and an activation that forward makes.

    So the models of transformers 5 are written: masks for the blocks by ``masking_utils``, and
    ``nn.ReLU()`` in DistilBertForSequenceClassification.
    """

    def __init__(self, num_classes: int, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, width), nn.Embedding(6, width)
        self.position_ids = nn.Buffer(torch.arange(6).expand((1, -1)), persistent=False)
        self.layer = nn.ModuleList(MaskedBlock(width) for _ in range(depth))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, words: Tensor, padding: Tensor) -> Tensor:
        """Return scores ``(batch, classes)`` of words and where there are none."""
        states = self.words(words)
        states = states + self.places(self.position_ids[:, : states.size(1)])
        rows = torch.arange(states.shape[0], device=states.device)[:, None, None]
        places = torch.arange(states.shape[1], device=states.device)[None, None, :]
        if padding.shape[1] != states.shape[1]:
            raise ValueError("of another length")
        seen = (places >= 0) & ~padding[rows, places].expand(-1, states.shape[1], -1)
        for layer in self.layer:
            states = layer(states, seen)
        states = states.view((-1, *words.size()[1:], states.size(-1)))
        return self.classifier(nn.ReLU()(states[:, 0]))


class Conv1D(nn.Module):
    """A linear layer whose weight stands the other way round."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(…, nf)``."""
        size_out = x.size()[:-1] + (self.nf,)  # noqa: RUF005
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class Gpt2Block(nn.Module):
    """Causal attention by a mask in a buffer, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)
        self.c_fc, self.c_out = Conv1D(4 * width, width), Conv1D(width, 4 * width)
        self.split_size, self.heads, self.dropout = width, heads, nn.Dropout(0.1)
        seen = torch.tril(torch.ones((16, 16), dtype=torch.bool)).view(1, 1, 16, 16)
        self.register_buffer("bias", seen, persistent=False)

    def _attend(self, x: Tensor) -> Tensor:
        parts = self.c_attn(x).split(self.split_size, dim=2)
        shape = (*x.shape[:-1], self.heads, self.split_size // self.heads)
        query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
        weights = torch.matmul(query, key.transpose(-1, -2)) / value.size(-1) ** 0.5
        query_length, key_length = query.size(-2), key.size(-2)
        causal = self.bias[:, :, key_length - query_length : key_length, :key_length]
        least = torch.full([], torch.finfo(torch.float32).min, dtype=torch.float32)
        weights = nn.functional.softmax(torch.where(causal, weights, least), dim=-1)
        mixed = torch.matmul(self.dropout(weights), value).transpose(1, 2).contiguous()
        return self.c_proj(mixed.reshape(*x.shape[:-1], self.split_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        """Return the states in a tuple."""
        x = hidden_states + self._attend(self.ln_1(hidden_states))
        return (x + self.dropout(self.c_out(nn.functional.gelu(self.c_fc(self.ln_2(x))))),)


class Gpt2(nn.Module):
    """Words and places, blocks, and scores of the next word by the weights of the words."""

    def __init__(self, num_classes: int, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(num_classes, width), nn.Embedding(16, width)
        self.drop, self.ln_f = nn.Dropout(0.1), nn.LayerNorm(width)
        self.h = nn.ModuleList([Gpt2Block(width, 2) for _ in range(depth)])
        self.lm_head = nn.Linear(width, num_classes, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return scores ``(batch, words, vocabulary)``."""
        input_ids = input_ids.view(-1, input_ids.size()[-1])
        position_ids = torch.arange(0, input_ids.shape[-1], dtype=torch.long).unsqueeze(0)
        hidden_states = self.drop(self.wte(input_ids) + self.wpe(position_ids))
        for block in self.h:
            hidden_states = block(hidden_states)[0]
        return self.lm_head(self.ln_f(hidden_states))


class Vit(nn.Module):
    """Patches, a token for the class, layers without a mask, and a class."""

    def __init__(self, num_classes: int, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.randn(1, 5, width) * 0.02)
        self.layer = nn.ModuleList([BertLayer(width, 2) for _ in range(depth)])
        self.layernorm, self.classifier = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return scores ``(batch, classes)`` of images ``(batch, 3, 8, 8)``."""
        batch_size, _, height, width = pixel_values.shape
        if height != 8 or width != 8:
            raise ValueError(f"Input image size ({height}*{width}) doesn't match model (8*8).")
        patches = self.projection(pixel_values).flatten(2).transpose(1, 2)
        cls_tokens = self.cls_token.expand(batch_size, -1, -1)
        x = torch.cat((cls_tokens, patches), dim=1) + self.position_embeddings
        for layer_module in self.layer:
            x = layer_module(x, None)[0]
        return self.classifier(self.layernorm(x)[:, 0, :])
