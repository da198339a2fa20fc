"""Images and a model without cost, whose tokens say which image and position they are.

Of each token the first three numbers are image // 256, image % 256 and position, exact in bfloat16
(up to 256 positions); the rest is noise.
"""

import torch
from PIL import Image

from visae.images.source import ImageEntry, LoadedImage
from visae.models.config import ModelIdentity
from visae.models.layout import Layout
from visae.models.preprocessing import Preprocessing
from visae.models.protocol import Output, Trace

SITE = "residual@9"


class NumberedImages:
    """Image i is one pixel that says i."""

    location = "numbered:"

    def __init__(self, n_images):
        self.entries = tuple(ImageEntry(ref=str(i)) for i in range(n_images))

    def load(self, ref):
        colour = int(ref) // 65536, int(ref) // 256 % 256, int(ref) % 256
        return LoadedImage(f"{int(ref):064x}", Image.new("RGB", (1, 1), colour))


class NumberedModel:
    """Tokens that name their image and position, as many and as wide as a ViT's."""

    identity = ModelIdentity(name="benchmark/numbered", title="Numbered", weights_sha256="0" * 64)
    preprocessing = Preprocessing(size=(1, 1), mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)
    sites = (SITE,)

    def __init__(self, d_model, grid=(14, 14)):
        self._grid, self._d_model = grid, d_model
        generator = torch.Generator().manual_seed(0)
        self._noise = torch.randn(grid[0] * grid[1] + 1, d_model, generator=generator)

    def layout(self, site):
        return Layout(special=("cls",), grid=self._grid)

    def d_model(self, site):
        return self._d_model

    def tokens(self, pixels, sites):
        high, middle, low = pixels[:, :, 0, 0].round().unbind(1)
        found = self._noise.repeat(len(pixels), 1, 1)
        found += torch.sin(low)[:, None, None]
        found[..., 0] = (256 * high + middle)[:, None]
        found[..., 1] = low[:, None]
        found[..., 2] = torch.arange(found.shape[1])
        return {SITE: found}

    def trace(self, pixels, sites):
        tokens = self.tokens(pixels, sites)
        return Trace(tokens, tokens, Output(tokens=tokens[SITE], logits=None))

    def resume(self, trace, site, tokens):
        return Output(tokens=tokens, logits=None)
