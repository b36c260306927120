"""A small character language model, for the corpora of corpora.py: `--import dist_cts.examples.characters`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_cts.examples.corpora import CHARACTERS, CONTEXT
from dist_cts.models import MODELS, Architecture


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a layer norm."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(channels, channels, bias=False)
        self.feed = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, channels], the same shape back."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, heads, L, channels / heads]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))


class CharacterModel(nn.Module):
    """A transformer with width x 64 channels."""

    def __init__(self, outputs: int, width: float = 1.0, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        channels = heads * round(64 * width / heads)
        self.embedding = nn.Embedding(len(CHARACTERS), channels)
        self.position = nn.Parameter(0.1 * torch.randn(CONTEXT, channels))
        self.blocks = nn.Sequential(*(Block(channels, heads) for _ in range(blocks)))
        self.norm, self.fc = nn.LayerNorm(channels), nn.Linear(channels, outputs)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, text: Tensor) -> Tensor:
        """Characters, int64 [B, L], to the logits of the next ones, [B, outputs, L]."""
        x = self.embedding(text) + self.position[: text.shape[1]]
        return self.fc(self.norm(self.blocks(x))).transpose(1, 2)


MODELS["characters"] = Architecture(CharacterModel, head="fc")
