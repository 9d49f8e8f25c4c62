"""ResNet18 and VGG16 in their usual form for images of 32 x 32 pixels, of any width, and a ResNet8 for a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn


WIDTH = 64  # channels of the first stage in the published networks


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.relu(self.residual(images) + self.shortcut(images), inplace=True)


def resnet(blocks: Sequence[int], width: int = WIDTH, num_classes: int = 10) -> nn.Sequential:
    """
    ResNet of basic blocks with a 3x3 convolution as its stem and without the first max-pool.

    Args:
        blocks (`Sequence[int]`): blocks of each stage; (2, 2, 2, 2) is ResNet18.
        width (`int`, defaults to 64): channels of the first stage; each of the others has twice those before it.
        num_classes (`int`, defaults to 10): outputs.

    Source: He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    channels = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(BasicBlock(channels, width * 2**stage, stride))
            channels = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def vgg16(width: int = WIDTH, num_classes: int = 10) -> nn.Sequential:
    """
    VGG16 with batch norm: 13 convolutions, 5 max-pools down to one pixel, and one linear layer.

    Args:
        width (`int`, defaults to 64): channels of the first stage; the others have 2, 4, 8 and 8 times as many.
        num_classes (`int`, defaults to 10): outputs.

    Source: Simonyan and Zisserman, *Very Deep Convolutional Networks for Large-Scale Image Recognition*, ICLR 2015.
    """
    layers: list[nn.Module] = []
    channels = 3
    for factor, convolutions in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(convolutions):
            layers += [
                nn.Conv2d(channels, factor * width, 3, padding=1),
                nn.BatchNorm2d(factor * width),
                nn.ReLU(inplace=True),
            ]
            channels = factor * width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, num_classes))


MODELS = {"resnet18": partial(resnet, (2, 2, 2, 2)), "resnet8": partial(resnet, (1, 1, 1)), "vgg16": vgg16}
