"""Inpainting: give back what was cut out of the picture.

    L = sum w (decoder(backbone(m(x))) - x)^2 / sum w,   w = hole where m hides, rest elsewhere

x: the first view; m(x): the same with rectangles or patches of it, all inside the ultrasound
sector, set to the mean grey. As rest is 0, what was never hidden earns nothing: copying it is no
task. What is hidden differs for each sample and each epoch. 1 is the error of a constant grey
picture. Pathak et al. 2016, "Context encoders", arXiv:1604.07379, without its discriminator, as
in its own experiments on features; patches as in He et al. 2022, arXiv:2111.06377.
"""

import dataclasses
from dataclasses import dataclass, field

from torch import nn

from sslus.engine.errors import InputError
from sslus.kernels.mask import Mask, mask_fill, masked_mse
from sslus.ssl.decoder import Decoder, encode
from sslus.ssl.loader import Views
from sslus.ssl.methods import Output

TWO_VIEWS = False  # the second view is not looked at: no nearby pairs
MAX_CELLS = 32  # across a picture: what the masks can tell apart


@dataclass(frozen=True)
class Config:
    kind: str = field(
        default="rectangles", metadata={"help": "What is hidden: rectangles or patches."}
    )
    rectangles: int = field(
        default=4, metadata={"help": "How many are hidden, overlaps allowed (rectangles)."}
    )
    min_side: float = field(
        default=0.15, metadata={"help": "Of a rectangle, as a share of the picture's."}
    )
    max_side: float = field(
        default=0.4, metadata={"help": "Of a rectangle, as a share of the picture's."}
    )
    ratio: float = field(
        default=0.6, metadata={"help": "Share of the sector that is hidden (patches)."}
    )
    patch: int = field(
        default=16, metadata={"help": "Side of a patch in pixels, at least 1/32 of the picture's."}
    )
    hole: float = field(default=1.0, metadata={"help": "Weight of the hidden pixels in the loss."})
    rest: float = field(default=0.0, metadata={"help": "Weight of the other pixels in the loss."})
    background: int = field(
        default=8,
        metadata={
            "help": "Largest grey level, 0 to 255, outside the sector; -1: hide things anywhere.",
            "least": -1,
        },
    )


RECIPES = {
    "default": {"views": "inpainting"},
    # Section 4: random regions, overlapping, of up to a quarter of the picture, and Adam.
    "paper": {
        "image_size": 224, "optimizer": "adamw", "weight_decay": 0.0, "views": "inpainting",
        "rectangles": 5, "min_side": 0.1, "max_side": 0.3, "background": -1,
    },
    # One rectangle of the area that torchvision's RandomErasing takes, .02 to .33 of the
    # picture, and the loss over the whole picture, as the study's code has it.
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
        if not (c.hole > 0 and c.rest >= 0):
            raise InputError(
                f"inpainting: want hole above 0 and rest not below, got {c.hole} and {c.rest}"
            )
        if image_size > MAX_CELLS * c.patch:
            raise InputError(
                f"inpainting: a patch of {c.patch} px is too small for pictures of {image_size} px;"
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
        """Half a grey level above the background is the sector's edge, in the views' units."""
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
        """Inpainting keeps nothing from one step to the next."""
