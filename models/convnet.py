"""A small residual convolutional network."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm and a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels_in, h, w] -> [batch, channels, h / stride, w / stride]."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ConvNet(nn.Module):
    """ResNet-20 for 32 x 32 images (He et al., "Deep residual learning", 2015, section 4.2), 272,474 parameters.

    The BatchNorm statistics are random too: with the initial zeros and ones a wrong folding would go unnoticed.

    Args:
        seed: seed of the weights and statistics.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.norm = nn.BatchNorm2d(16)
            widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
            self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)))
            self.classifier = nn.Linear(64, 10)
            for part in self.modules():
                if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
                    nn.init.normal_(part.running_mean, std=0.1)
                    nn.init.uniform_(part.running_var, 0.5, 1.5)
                    nn.init.uniform_(part.weight, 0.5, 1.5)
                    nn.init.normal_(part.bias, std=0.1)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [batch, 3, height, width] -> logits [batch, 10]."""
        features = self.blocks(torch.relu(self.norm(self.stem(pixels))))
        return self.classifier(features.mean((2, 3)))
