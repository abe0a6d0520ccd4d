"""Networks with branches, whose memory depends on the order of their nodes: inception-, densenet-, NAS-, U-Net-like.

Small enough for tests, seeded; without BatchNorm, which is folded into the convolutions before anything is planned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Inception(nn.Module):
    """Modules of four branches that are concatenated (Szegedy et al., "Going deeper with convolutions", 2014).

    Args:
        width: channels of each branch.
        modules: number of modules.
        seed: seed of the weights.
    """

    def __init__(self, width: int = 16, modules: int = 3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, width, 3, 2, 1)
            self.branches = nn.ModuleList(
                nn.ModuleList(_inception_branches(width if index == 0 else 4 * width, width))
                for index in range(modules)
            )
            self.classifier = nn.Linear(4 * width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [batch, 3, height, width] -> logits [batch, 10]."""
        x = torch.relu(self.stem(pixels))
        for branches in self.branches:
            assert isinstance(branches, nn.ModuleList)
            x = torch.cat([branch(x) for branch in branches], 1)
        return self.classifier(x.mean((2, 3)))


def _inception_branches(channels: int, width: int) -> list[nn.Module]:
    wide = 4 * width

    def conv(a: int, b: int, kernel: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, kernel, 1, kernel // 2), nn.ReLU()]

    return [
        nn.Sequential(*conv(channels, wide, 1), *conv(wide, width, 3)),
        nn.Sequential(*conv(channels, wide, 1), *conv(wide, width, 5)),
        nn.Sequential(*conv(channels, wide, 1), *conv(wide, wide, 3), *conv(wide, width, 1)),
        nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv(channels, width, 1)),
    ]


class DenseNet(nn.Module):
    """Blocks whose layers read all layers before them (Huang et al., 2017), with 1 x 1 bottlenecks.

    Args:
        growth: channels that a layer adds.
        layers: layers of a block.
        blocks: number of blocks, each at half the resolution of the one before.
        seed: seed of the weights.
    """

    def __init__(self, growth: int = 12, layers: int = 6, blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            channels = 2 * growth
            self.stem = nn.Conv2d(3, channels, 3, 2, 1)
            self.blocks = nn.ModuleList()
            self.transitions = nn.ModuleList()
            for _ in range(blocks):
                self.blocks.append(
                    nn.ModuleList(_dense_layer(channels + index * growth, growth) for index in range(layers))
                )
                total = channels + layers * growth
                channels = total // 2
                self.transitions.append(nn.Sequential(nn.Conv2d(total, channels, 1), nn.AvgPool2d(2)))
            self.classifier = nn.Linear(channels, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [batch, 3, height, width] -> logits [batch, 10]."""
        x = torch.relu(self.stem(pixels))
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            assert isinstance(block, nn.ModuleList)
            for layer in block:
                x = torch.cat([x, layer(x)], 1)
            x = transition(x)
        return self.classifier(x.mean((2, 3)))


def _dense_layer(channels: int, growth: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 4 * growth, 1), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, 1, 1), nn.ReLU()
    )


class NasCells(nn.Module):
    """Cells wired at random, as neural architecture search finds them (Xie et al., "Randomly wired networks", 2019).

    Every node adds what it reads, then Relu and a separable 3 x 3 convolution. What nobody reads is averaged at the end
    of a cell. Nodes run in the order of their numbers, as the papers' code does.

    Args:
        width: channels.
        nodes: nodes of a cell.
        cells: number of cells, each at half the resolution of the one before.
        seed: seed of the wiring and the weights.
    """

    def __init__(self, width: int = 24, nodes: int = 20, cells: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, width, 3, 2, 1)
            self.cells = nn.ModuleList(nn.ModuleList(_separable(width) for _ in range(nodes)) for _ in range(cells))
            self.wiring = [_wire(nodes) for _ in range(cells)]
            self.classifier = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [batch, 3, height, width] -> logits [batch, 10]."""
        x = torch.relu(self.stem(pixels))
        for cell, wiring in zip(self.cells, self.wiring, strict=True):
            assert isinstance(cell, nn.ModuleList)
            results = [x]
            for node, sources in zip(cell, wiring, strict=True):
                read = [results[source] for source in sources]
                results.append(node(torch.relu(read[0] + read[1] if len(read) > 1 else read[0])))
            ends = sorted(set(range(len(results))) - {source for sources in wiring for source in sources})
            total = results[ends[0]]
            for index in ends[1:]:
                total = total + results[index]
            x = torch.max_pool2d(total / len(ends), 2)
        return self.classifier(x.mean((2, 3)))


def _separable(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.Conv2d(width, width, 1))


def _wire(nodes: int) -> list[list[int]]:
    """For each node the one or two of the results before it that it reads; 0 is the cell's input."""
    return [sorted(torch.randperm(index + 1)[:2].tolist()) for index in range(nodes)]


class UNet(nn.Module):
    """An encoder and a decoder with shortcuts between them (Ronneberger et al., 2015), two heads at full resolution.

    Args:
        width: channels at full resolution.
        depth: halvings of the resolution.
        seed: seed of the weights.
    """

    def __init__(self, width: int = 8, depth: int = 3, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = [width * 2**level for level in range(depth + 1)]
            self.down = nn.ModuleList(_double(3 if a == 0 else widths[a - 1], widths[a]) for a in range(depth + 1))
            self.up = nn.ModuleList(nn.ConvTranspose2d(widths[a + 1], widths[a], 2, 2) for a in range(depth))
            self.join = nn.ModuleList(_double(2 * widths[a], widths[a]) for a in range(depth))
            self.masks = nn.Conv2d(width, 2, 1)
            self.edges = nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.ReLU(), nn.Conv2d(4 * width, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [batch, 3, h, w] -> masks [batch, 2, h, w], edges [batch, 1, h, w]; multiples of 2 ** depth."""
        shortcuts: list[Tensor] = []
        x = pixels
        for level, block in enumerate(self.down):
            x = block(torch.max_pool2d(x, 2) if level else x)
            shortcuts.append(x)
        for level in reversed(range(len(self.up))):
            x = self.join[level](torch.cat([shortcuts[level], self.up[level](x)], 1))
        return self.masks(x), self.edges(x)


def _double(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())


class MobileNet(nn.Module):
    """Inverted residuals (Sandler et al., "MobileNetV2", 2018): most memory is needed at the front.

    Args:
        seed: seed of the weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        plan = [(16, 1, 1), (24, 6, 2), (24, 6, 1), (40, 6, 2), (40, 6, 1), (80, 6, 2), (80, 6, 1), (96, 6, 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6())
            blocks: list[nn.Module] = []
            channels = 16
            for width, expansion, stride in plan:
                blocks.append(InvertedResidual(channels, width, expansion, stride))
                channels = width
            self.blocks = nn.Sequential(*blocks)
            self.classifier = nn.Linear(channels, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [batch, 3, height, width] -> logits [batch, 10]."""
        return self.classifier(self.blocks(self.stem(pixels)).mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, narrow; with a shortcut where the shape stays."""

    def __init__(self, channels: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.shortcut = stride == 1 and channels == width
        self.layers = nn.Sequential(
            nn.Conv2d(channels, inner, 1),
            nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner),
            nn.ReLU6(),
            nn.Conv2d(inner, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, h, w] -> [batch, width, h / stride, w / stride]."""
        return x + self.layers(x) if self.shortcut else self.layers(x)
