"""Inpainting: reconstruct what was cut out of the image.

    L = sum w (decoder(backbone(m(x))) - x)^2 / sum w,   w = hole where m hides, rest elsewhere

x: the first view; m(x): the same view with rectangles or patches, all inside the ultrasound
sector, set to the mean grey value. By default rest is 0, so copying visible pixels earns nothing.
What is hidden differs for each sample and epoch. A constant grey image has an error of 1. Pathak
et al. 2016, "Context encoders", arXiv:1604.07379, without its discriminator, as in its own
experiments on features; patches as in He et al. 2022, arXiv:2111.06377.
"""

import dataclasses
from dataclasses import dataclass, field

from torch import nn

from sslus.engine.errors import InputError
from sslus.kernels.mask import Mask, mask_fill, masked_mse
from sslus.ssl.decoder import Decoder, encode
from sslus.ssl.loader import Views
from sslus.ssl.methods import Output

PAIRS, ONE_VIEW = False, True
MAX_CELLS = 32  # across the image: the finest mask


@dataclass(frozen=True)
class Config:
    kind: str = field(
        default="rectangles", metadata={"help": "What is hidden: rectangles or patches."}
    )
    rectangles: int = field(
        default=4, metadata={"help": "Number of hidden rectangles, which may overlap."}
    )
    min_side: float = field(
        default=0.15, metadata={"help": "Smallest side of a rectangle, as a share of the image's."}
    )
    max_side: float = field(
        default=0.4, metadata={"help": "Largest side of a rectangle, as a share of the image's."}
    )
    ratio: float = field(
        default=0.6, metadata={"help": "With patches: share of the sector that is hidden."}
    )
    patch: int = field(
        default=16, metadata={"help": "Side of a patch in pixels, at least 1/32 of the image's."}
    )
    hole: float = field(default=1.0, metadata={"help": "Weight of the hidden pixels in the loss."})
    rest: float = field(default=0.0, metadata={"help": "Weight of the other pixels in the loss."})
    background: int = field(
        default=8,
        metadata={
            "help": "Largest grey level (0 to 255) outside the sector; -1: hide parts anywhere.",
            "least": -1,
        },
    )

    def __post_init__(self):
        if not self.hole > 0:
            raise InputError(f"hole {self.hole}: want more than 0")


RECIPES = {
    "default": {"views": "inpainting"},
    # Section 4: random overlapping regions that cover up to a quarter of the image, and Adam.
    "paper": {
        "image_size": 224, "optimizer": "adamw", "weight_decay": 0.0, "views": "inpainting",
        "rectangles": 5, "min_side": 0.1, "max_side": 0.3, "background": -1,
    },
    # One rectangle with the area of torchvision's RandomErasing, 0.02 to 0.33 of the image, and the
    # loss over the whole image, as in the study's code. There, erasing is the only augmentation;
    # here, the views are crops and flips too.
    "study": {
        "backbone": "resnet50", "init": "imagenet", "image_size": 256, "batch_size": 2048,
        "epochs": 1000, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-6,
        "warmup_epochs": 0, "final_lr": 1e-5, "views": "inpainting", "rectangles": 1,
        "min_side": 0.14, "max_side": 0.57, "background": -1, "rest": 1.0,
    },
}  # fmt: skip


class Method(nn.Module):
    def __init__(self, backbone: nn.Module, config: Config, image_size: int):
        super().__init__()
        c = config
        if image_size > MAX_CELLS * c.patch:
            raise InputError(
                f"inpainting: a patch of {c.patch} px is too small for images of {image_size} px;"
                f" want --patch {-(-image_size // MAX_CELLS)} or more"
            )
        try:
            self.mask = Mask(
                c.kind, patch=c.patch, ratio=c.ratio, num=c.rectangles, min_side=c.min_side,
                max_side=c.max_side,
            )  # fmt: skip
        except ValueError as e:
            raise InputError(f"inpainting: {e}") from e
        self.backbone = backbone
        self.decoder = Decoder(backbone, image_size)
        self.config = config

    def normalised_by(self, mean: float, std: float) -> None:
        """Place the sector's edge half a grey level above the background, in the views' units."""
        edge = ((self.config.background + 0.5) / 255 - mean) / std
        if self.config.background >= 0:
            self.mask = dataclasses.replace(self.mask, background=edge)

    def forward(self, views: Views) -> Output:
        if views.weights is not None:
            raise InputError("inpainting: learns from single frames, which have no pair weights")
        x, ids = views.va, views.ids
        seen, features = encode(self.backbone, mask_fill(x, ids, self.mask))
        picture = self.decoder(seen, features, x.shape[-2:])
        weights = {"hole": self.config.hole, "rest": self.config.rest}
        loss = masked_mse(picture, x, ids, self.mask, **weights)
        return Output(loss, {}, features)

    def after_step(self, step: int, num_steps: int) -> None:
        """Inpainting keeps no state between steps."""
