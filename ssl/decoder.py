"""From a backbone's feature map back to an image, for any timm model and image size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslus.engine.errors import InputError

MAX_WIDTH = 256  # channels at the feature map; the decoder then costs a tenth of a ResNet
MIN_WIDTH = 16


def encode(backbone: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, H, W) -> the backbone's last feature map (B, C, h, w) and its features (B, F).

    One forward pass; the features are those that `backbone(x)` returns.
    """
    seen = backbone.forward_features(x)
    return to_map(backbone, seen, x.shape[-2:]), backbone.forward_head(seen, pre_logits=True)


def to_map(backbone: nn.Module, seen: Tensor, size: tuple[int, int]) -> Tensor:
    """The output of timm's `forward_features` as (B, C, h, w), for images of H x W = size.

    Convolutional networks give that already, the Swin family (B, h, w, C), and vision transformers
    (B, prefix + h * w, C): first class tokens and registers, then the grid. Raises InputError if
    the tokens do not form a grid, or if there are several maps (CoaT, CrossViT).
    """
    if not isinstance(seen, Tensor):
        raise InputError(
            f"reconstruction: {type(backbone).__name__} has {len(seen)} feature maps, not one; use"
            " another backbone"
        )
    if seen.ndim == 4:
        channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        return seen.permute(0, 3, 1, 2) if channels_last else seen
    tokens = seen[:, getattr(backbone, "num_prefix_tokens", 0) :]
    num = tokens.shape[1]
    height = max(1, round(math.sqrt(num * size[0] / size[1])))
    if num % height:
        raise InputError(
            f"reconstruction: the {num} tokens of {type(backbone).__name__} form no grid for"
            f" {size[0]} x {size[1]} px; use another backbone"
        )
    return tokens.transpose(1, 2).unflatten(2, (height, num // height))


class Decoder(nn.Module):
    """(B, C, h, w) and (B, F) -> (B, 1, H, W), reversing the backbone's downsampling.

    A 1 x 1 convolution reduces the channels of the map, which is then upsampled step by step to
    H x W, with a convolution at each size and half the channels at the next. The sizes are H x W
    halved repeatedly, rounded up like the output of strided convolutions: 50 px come from 2, 4, 7,
    13, 25. Upsampling before convolving avoids checkerboard artefacts (Odena et al. 2016).

    The features are added at every position alike, so that the loss trains everything they are
    made from (a class token, a norm after the pooling).
    """

    def __init__(self, backbone: nn.Module, image_size: int):
        super().__init__()
        channels, height, width = _map_shape(backbone, image_size)
        self.steps = max(1, round(math.log2(image_size / max(height, width))))
        wide = max(MIN_WIDTH, min(MAX_WIDTH, channels // 2))
        widths = [max(MIN_WIDTH, wide >> i) for i in range(self.steps)]
        self.narrow = nn.Conv2d(channels, wide, 1)
        self.spread = nn.Linear(backbone.num_features, wide)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)
            )
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, x: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        """size: H x W of the image."""
        x = self.narrow(x) + self.spread(features)[:, :, None, None]
        for step, block in enumerate([*self.blocks, self.last], 1):
            part = 1 << (self.steps - step)
            x = F.interpolate(x, [-(-side // part) for side in size], mode="nearest")
            x = block(x)
        return x


@torch.no_grad()
def _map_shape(backbone: nn.Module, image_size: int) -> tuple[int, int, int]:
    """C, h, w of the map, measured because timm does not state it for all models."""
    training = backbone.training
    x = torch.zeros(1, 1, image_size, image_size, device=next(backbone.parameters()).device)
    shape = to_map(backbone.eval(), backbone.forward_features(x), x.shape[-2:]).shape
    backbone.train(training)
    return tuple(shape[1:])
