"""Data, models and losses as a user brings them, one of each task; importable by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

COUNT = 44


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows() -> TensorDataset:
    """Six numbers, and one that follows from two of them."""
    x = _draw(COUNT, 6)
    return TensorDataset(x, x[:, 0] * x[:, 1])


def labels() -> TensorDataset:
    """Six numbers, and three labels that hold or not."""
    x = _draw(COUNT, 6)
    return TensorDataset(x, (x[:, :3] > 0).to(torch.int64))


def pictures() -> TensorDataset:
    """Images of 3x8x8, and a class for each pixel: which channel is the brightest."""
    x = (_draw(COUNT, 3, 8, 8).abs() * 100).clamp(max=255).to(torch.uint8)
    return TensorDataset(x, x.argmax(1))


def numbers() -> TensorDataset:
    """A number, and its square."""
    x = _draw(COUNT)
    return TensorDataset(x, x.square())


def grey() -> TensorDataset:
    """Images of 8x8 without a channel, and a class for each pixel: how bright it is."""
    x = _draw(COUNT, 8, 8)
    return TensorDataset(x, (x > 0.5).long() + (x > -0.5).long())


def drawings() -> TensorDataset:
    """Images of 1x8x8 and one of ten classes: which row is white."""
    x = (_draw(120, 1, 8, 8).abs() * 40).to(torch.uint8)
    y = torch.arange(120) % 10
    x[torch.arange(120), 0, y.clamp(max=7)] = 255
    return TensorDataset(x, y)


def photos() -> TensorDataset:
    """Images of 3x8x8, and which of their channels is the brightest."""
    x = pictures().tensors[0]
    return TensorDataset(x, x.flatten(2).float().mean(2).argmax(1))


class Sentences(Dataset):
    """Tokens alone, of which the next is to be told; each is one above the last, or random."""

    classes = 11

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        return (torch.arange(9) + index) % 11


class Words(Dataset):
    """Tokens of different number, and a class: whether the first is even."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self.client_ids = ["b" if k % 3 else "a" for k in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.arange(3 + index % 4) + index % 7, index % 7 % 2


class Padded(Dataset):
    """Words, which of them are none, and a class: whether there are more than three."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], int]:
        there = torch.arange(6) < 2 + index % 5
        return (torch.arange(1, 7) * (1 + index % 3) * there, ~there), int(2 + index % 5 > 3)


class Twofold(Dataset):
    """An image and three numbers, and what their sums make together."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        image = (_draw(1, 8, 8, seed=index).abs() * 80).clamp(max=255).to(torch.uint8)
        numbers = _draw(3, seed=1000 + index)
        return (image, numbers), image.float().mean() / 64 + numbers.sum()


def padded(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Put examples of different length together."""
    inputs = nn.utils.rnn.pad_sequence([x for x, _ in examples], batch_first=True)
    return inputs, torch.tensor([y for _, y in examples])


def words(text: str) -> list[int]:
    """Number the words of a text by their order."""
    known = sorted(set(text.split()))
    return [known.index(word) for word in text.split()]


class Pieces:
    """A tokenizer as those of libraries: made of something, with a vocabulary of its own."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size

    def encode(self, text: str) -> SimpleNamespace:
        """Return the tokens of a text, as ``tokenizers`` does."""
        return SimpleNamespace(ids=words(text))


def words_of_row(row: dict[str, Any]) -> tuple[Tensor, int]:
    """Make an example of a row of a set of images: its brightest pixel, some times."""
    words = torch.full((2 + row["label"],), max(row["image"].getextrema()))
    return words, row["label"]


class Segments(nn.Module):
    """Three convolutions that keep the size."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(input_shape[0], width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``(batch, classes, H, W)``."""
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


class Bag(nn.Module):
    """Mean of embeddings, and two linear layers."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores ``(batch, classes)``."""
        return self.out(F.relu(self.mix(self.embedding(tokens).mean(1))))


class MaskedBlock(nn.Module):
    """Attention of words to those that are there, and a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return a tensor like `x`, ``(batch, words, width)``."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + F.relu(self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)))


class Masked(nn.Module):
    """Embeddings, blocks that each need the mask, and a mean over the words that are there."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.first, self.second = MaskedBlock(width), MaskedBlock(width)
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(width, num_classes)

    def forward(self, words: Tensor, padding: Tensor) -> Tensor:
        """Return scores ``(batch, classes)`` of words and where there are none."""
        seen = ~padding[:, None, :]
        x = self.second(self.drop(self.first(self.embedding(words), seen)), seen)
        there = (~padding)[:, :, None]
        return self.out((x * there).sum(1) / there.sum(1))


class Both(nn.Module):
    """A convolution for an image, which is joined by numbers in the end; forward takes a tuple."""

    def __init__(self, input_shape: tuple[tuple, tuple], num_classes: int) -> None:
        super().__init__()
        (_, channels, *_), (_, numbers) = input_shape
        self.first, self.second = nn.Conv2d(channels, 4, 3), nn.Conv2d(4, 4, 3)
        self.join, self.out = nn.Linear(4 + numbers, 8), nn.Linear(8, num_classes)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Return numbers ``(batch, outputs)``."""
        image, numbers = inputs
        x = F.relu(self.second(F.relu(self.first(image)))).mean((2, 3))
        return self.out(F.relu(self.join(torch.cat([x, numbers], 1))))


class Bert(nn.Module):
    """An encoder of torch's own modules, as BERT has it: words, which are none, and a class."""

    def __init__(self, num_classes: int, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, width), nn.Parameter(_draw(6, width))
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, words: Tensor, padding: Tensor) -> Tensor:
        """Return scores ``(batch, classes)`` of what stands at the first place."""
        x = self.encoder(self.words(words) + self.places, src_key_padding_mask=padding)
        return self.head(x[:, 0])


def vit(num_classes: int) -> nn.Module:
    """Return torchvision's transformer of images of 3x8x8, with three blocks."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(8, 4, 3, 2, 8, 16, num_classes=num_classes)


def steep(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of errors to the power of 1.5."""
    return (outputs - targets).abs().pow(1.5).mean()


def weighted(outputs: Tensor, targets: Tensor, weight: float) -> Tensor:
    """Return the mean squared error, times its weight."""
    return F.mse_loss(outputs, targets) * weight


def worst(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the largest error of each example."""
    return (outputs - targets).abs().flatten(1).amax(1)


class Spread:
    """As those of torchmetrics: how far the errors of a whole part are apart."""

    higher_is_better = False

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return it of one mini-batch, as nobody should ask."""
        raise AssertionError("a mini-batch is no whole part")

    def reset(self) -> None:
        """Forget what was seen."""
        self.seen.clear()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in outputs and targets ``(rows,)``."""
        self.seen.append(outputs - targets)

    def compute(self) -> Tensor:
        """Return the largest error less the smallest."""
        errors = torch.cat(self.seen)
        return errors.max() - errors.min()


def determination(outputs: Tensor, targets: Tensor) -> float:
    """Return R², which is no mean over examples."""
    rest = (outputs - targets).square().sum() / (targets - targets.mean()).square().sum()
    return 1.0 - float(rest)


def crossed(outputs: Tensor, targets: Tensor) -> Tensor:
    """Multiply what cannot be."""
    return (outputs @ targets).mean()


def detached(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return a loss that nothing is learned of."""
    return (outputs.detach() - targets).abs().mean()


def shares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return how many are above 0, of each class: no number."""
    return (outputs > 0).double().mean(0)


def rows_of_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return a loss for each example, which is no loss of a mini-batch."""
    return (outputs - targets).square().flatten(1).mean(1)
