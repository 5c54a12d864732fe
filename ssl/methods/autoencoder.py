"""Autoencoder: reconstruct the clean image from a corrupted one.

    L = mean over pixels (decoder(backbone(c(x))) - x)^2

x: the first view, a whole frame; c(x): the second view, the same frame with changed grey values,
blur and speckle. As pixels are normalised, a constant grey image has an error of 1. Vincent et
al. 2008, "Extracting and composing robust features with denoising autoencoders"; with a
convolutional backbone, on ultrasound: the study arXiv:2407.21738.
"""

import dataclasses
from dataclasses import dataclass, field

from torch import nn

from sslus.engine.errors import InputError
from sslus.kernels.mask import Mask, masked_mse
from sslus.ssl.decoder import Decoder, encode
from sslus.ssl.loader import Views
from sslus.ssl.methods import Output
from sslus.ssl.views import ViewConfig

PAIRS = False  # both come from one frame: no nearby pairs
CELLS = 32  # across the image: the resolution at which the ultrasound sector is found


@dataclass(frozen=True)
class Config:
    outside: float = field(
        default=1.0,
        metadata={"help": "Weight of pixels outside the ultrasound sector; those inside have 1."},
    )
    background: int = field(
        default=8, metadata={"help": "Largest grey level (0 to 255) outside the sector."}
    )


RECIPES = {
    "default": {"views": "autoencoder"},
    # Its networks are small and not convolutional; what carries over is the task of removing noise,
    # without any other penalty.
    "paper": {"views": "autoencoder,p_jitter=0,p_blur=0", "weight_decay": 0.0},
    # Of the study's RandAugment, this keeps what leaves pixels in place: grey values, blur and
    # noise. Its learning rate falls in steps to 1e-5 of the peak; here a cosine does.
    "study": {
        "backbone": "resnet50", "init": "imagenet", "image_size": 256, "batch_size": 2048,
        "epochs": 1000, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-6,
        "warmup_epochs": 0, "final_lr": 1e-5, "views": "autoencoder",
    },
}  # fmt: skip


def check_views(clean: ViewConfig, corrupted: ViewConfig) -> None:
    """Raises InputError unless both show the same pixels, and the first one as they are."""
    still = {"min_area": 1, "max_area": 1, "max_aspect": 1, "p_flip": 0}
    for view in (clean, corrupted):
        for name, value in still.items():
            if getattr(view, name) != value:
                raise InputError(
                    f"--views: the autoencoder compares two views pixel by pixel, so {name} must"
                    f" be {value}; start from --views autoencoder"
                )
    for name, value in vars(clean).items():
        if name.startswith("p_") and value:
            raise InputError(
                f"--views: the autoencoder's first view is its target, and {name}={value:g} would"
                " corrupt it too, since a field given in --views applies to both views"
            )


class Method(nn.Module):
    def __init__(self, backbone: nn.Module, config: Config, image_size: int):
        super().__init__()
        self.backbone = backbone
        self.decoder = Decoder(backbone, image_size)
        self.config = config
        # The whole sector counts as "hidden", so that the loss can tell it from the rest.
        self.sector = Mask("patches", patch=-(-image_size // CELLS), ratio=1.0)

    def normalised_by(self, mean: float, std: float) -> None:
        """Place the sector's edge half a grey level above the background, in the views' units."""
        edge = ((self.config.background + 0.5) / 255 - mean) / std
        if self.config.outside != 1:  # else the sector would cost a pass and change nothing
            self.sector = dataclasses.replace(self.sector, background=edge)

    def forward(self, views: Views) -> Output:
        if views.weights is not None:
            raise InputError("autoencoder: learns from single frames, which have no pair weights")
        clean, corrupted, ids = views.va, views.vb, views.ids
        seen, features = encode(self.backbone, corrupted)
        picture = self.decoder(seen, features, clean.shape[-2:])
        loss = masked_mse(picture, clean, ids, self.sector, hole=1.0, rest=self.config.outside)
        return Output(loss, {}, features)

    def after_step(self, step: int, num_steps: int) -> None:
        """The autoencoder keeps no state between steps."""
