"""A multilayer perceptron for 28 x 28 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mlp784(nn.Module):
    """LeNet-300-100: 784-300-100-10 with ReLU, 266,610 parameters.

    The network of LeCun et al., "Gradient-based learning applied to document recognition" (1998), and since Han et al.,
    "Learning both weights and connections" (2015), the usual one for pruning and quantization.

    Args:
        seed: seed of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden1 = nn.Linear(784, 300)
            self.hidden2 = nn.Linear(300, 100)
            self.classifier = nn.Linear(100, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [batch, 784] -> logits [batch, 10]."""
        return self.classifier(torch.relu(self.hidden2(torch.relu(self.hidden1(pixels)))))
