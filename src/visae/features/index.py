"""Reading a feature index: statistics, examples, heat maps and codes, each without the rest.

Opening compares the size of every file with the recorded one; ``verify`` compares checksums.
"""

import bisect
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from visae.errors import FeatureIndexError, StoreError
from visae.features.codes_files import read_shards, read_tokens
from visae.features.examples_file import example_rows, read_examples
from visae.features.places import TokenPlaces
from visae.features.record import Band, Example, IndexRecord
from visae.features.table import FeatureRow, FeatureTable
from visae.features.thumbnails import read_thumbnail
from visae.images.catalog import ImageTable
from visae.saes.checkpoint import SAERecord
from visae.saes.codes import SparseCodes
from visae.storage.records import read_record
from visae.storage.tensors import FileRef, verify_file

__all__ = ["FeatureIndex", "find_damage"]

_AGAIN = "Run the same visae index command again, which makes what is missing"


class FeatureIndex:
    """A complete feature index, opened for reading.

    Raises:
        FeatureIndexError: when there is no index, it is incomplete, or one of its files is
            missing or cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            raise FeatureIndexError(
                "There is no feature index here",
                where=folder,
                fix="Make one with: visae index --sae DIR --store DIR --out DIR",
            )
        self.record = read_record(IndexRecord, self.folder / "index.json", error=FeatureIndexError)
        if not self.record.complete:
            n_written = len(list((self.folder / "codes").glob("*.safetensors")))
            what = f"the codes of {n_written} of {self.record.n_shards} shards are there"
            raise FeatureIndexError(f"This index is incomplete: {what}", where=folder, fix=_AGAIN)
        if damage := find_damage(self.folder, self.record):
            raise FeatureIndexError(damage[0], where=self.folder, fix=_AGAIN)

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.record.n_features

    @property
    def n_images(self) -> int:
        """Number of images that were looked at."""
        return self.record.n_images

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the images, sorted."""
        return self.record.classes

    @functools.cached_property
    def features(self) -> FeatureTable:
        """The statistics of every feature."""
        return FeatureTable(self.folder / self.record.files["features"].name)

    @functools.cached_property
    def images(self) -> ImageTable:
        """The images that were looked at; row i is image i of the codes and examples."""
        path = self.folder / self.record.files["images"].name
        try:
            return ImageTable.read(path)
        except StoreError as failure:
            raise FeatureIndexError(failure.what, where=path, fix=_AGAIN) from failure

    def row(self, feature: int) -> FeatureRow:
        """The statistics of one feature.

        Raises:
            FeatureIndexError: when there is no such feature.
        """
        return self.features.row(feature)

    def name(self, feature: int) -> str:
        """The feature as it is written: ``sae-name:1234``."""
        return f"{self.record.sae_name}:{feature}"

    def examples(self, feature: int) -> dict[Band, list[Example]]:
        """The images that stand for a feature, by band, strongest first.

        Raises:
            FeatureIndexError: when there is no such feature or the file is damaged.
        """
        self._check_feature(feature)
        ids = self.images.content_ids
        table = read_examples(self.folder / self.record.files["examples"].name, feature)
        return {
            band: [
                Example(image_row=image, content_id=ids[image], max=largest)
                for image, largest in rows
            ]
            for band, rows in table.items()
        }

    def heat_map(self, feature: int, image_row: int) -> Float[Tensor, "row column"]:
        """A feature's activation at every patch of an image, 0 where it does not fire.

        Raises:
            FeatureIndexError: when there is no such feature or image, or no patches were encoded.
        """
        return self.heat_maps(feature, [image_row])[0]

    def heat_maps(
        self, feature: int, image_rows: Sequence[int]
    ) -> Float[Tensor, "image row column"]:
        """A feature's activation at every patch of some images; see ``heat_map``."""
        self._check_feature(feature)
        places = TokenPlaces.of(self.record.layout, self.record.tokens)
        if places.n_patches == 0:
            raise FeatureIndexError(
                "This index holds special tokens only, so there are no heat maps",
                where=self.folder,
                fix="Index an SAE that was trained on patches",
            )
        maps = torch.zeros(len(image_rows), places.n_tokens)
        for number, image_row in enumerate(image_rows):
            codes = self.codes(image_row)
            hits = torch.nonzero(codes.features == feature).flatten()
            tokens = torch.searchsorted(codes.offsets, hits, right=True) - 1
            maps[number, tokens] = codes.values[hits]
        return maps[:, places.n_special :].reshape(len(image_rows), *places.grid)

    def codes(self, image_row: int) -> SparseCodes:
        """The codes of all tokens of one image.

        Raises:
            FeatureIndexError: when there is no such image or its codes are damaged.
        """
        if not 0 <= image_row < self.n_images:
            raise FeatureIndexError(
                f"There is no image {image_row}",
                where=self.folder,
                fix=f"Give a row from 0 to {self.n_images - 1}",
            )
        starts = [shard.first_image for shard in self.record.codes]
        shard = self.record.codes[bisect.bisect_right(starts, image_row) - 1]
        first = (image_row - shard.first_image) * self.record.tokens_per_image
        return read_tokens(
            self.folder / shard.file.name,
            slice(first, first + self.record.tokens_per_image),
            n_features=self.n_features,
        )

    def shards(self) -> Iterator[SparseCodes]:
        """The codes of all tokens, in order, a part at a time; each part is whole images."""
        return read_shards(
            self.folder,
            self.record.codes,
            tokens_per_image=self.record.tokens_per_image,
            n_features=self.n_features,
        )

    def image_max(self) -> SparseCodes:
        """The largest activation of each feature on each image, as codes with a row an image."""
        per_image = self.record.tokens_per_image
        return SparseCodes.join([codes.max_per_image(per_image) for codes in self.shards()])

    def thumbnail(self, content_id: str) -> Image.Image:
        """What the model saw of an image that serves as an example, as RGB.

        Raises:
            FeatureIndexError: when the image is no example, or its thumbnail is damaged.
        """
        if content_id not in self._content_ids:
            raise FeatureIndexError(
                f"This index has not looked at image {content_id!r}",
                where=self.folder,
                fix="Give a content id of its images.parquet",
            )
        return read_thumbnail(self.folder, content_id)

    def require_sae(self, sae: SAERecord) -> None:
        """Refuse an SAE that this index was not made from.

        Raises:
            FeatureIndexError: unless the SAE's weights are those that made the codes.
        """
        if sae.weights.sha256 != self.record.sae_sha256:
            raise FeatureIndexError(
                f"This index was made from another SAE than the one given, from "
                f"{self.record.sae_name} with weights {self.record.sae_sha256[:12]}",
                where=self.folder,
                fix="Give that SAE, or build an index of this one with visae index",
            )

    def verify(self) -> None:
        """Compare every file with its checksum, and read everything once.

        Raises:
            FeatureIndexError: naming the first file that is altered, and what to do.
        """
        for ref in _files(self.record):
            verify_file(self.folder, ref, error=FeatureIndexError)
        for _codes in self.shards():
            pass
        if len(self.features) != self.n_features or len(self.images) != self.n_images:
            raise FeatureIndexError(
                "The tables of this index have other lengths than it records",
                where=self.folder,
                fix="Delete the folder and build the index again",
            )
        for content_id in sorted(self._example_ids()):
            read_thumbnail(self.folder, content_id)

    def _check_feature(self, feature: int) -> None:
        if not 0 <= feature < self.n_features:
            raise FeatureIndexError(
                f"There is no feature {feature}",
                where=self.folder,
                fix=f"Give a number from 0 to {self.n_features - 1}",
            )

    @functools.cached_property
    def _content_ids(self) -> frozenset[str]:
        return frozenset(self.images.content_ids)

    def _example_ids(self) -> set[str]:
        rows = example_rows(self.folder / self.record.files["examples"].name)
        return {self.images.content_ids[row] for row in rows}


def find_damage(folder: Path, record: IndexRecord) -> list[str]:
    """Which files of a complete index are missing or have another size than recorded."""
    found = []
    for ref in _files(record):
        path = folder / ref.name
        if not path.is_file():
            found.append(f"{ref.name} is missing")
        elif path.stat().st_size != ref.n_bytes:
            found.append(f"{ref.name} has {path.stat().st_size} bytes instead of {ref.n_bytes}")
    return found


def _files(record: IndexRecord) -> Iterator[FileRef]:
    yield from record.files.values()
    for shard in record.codes:
        yield shard.file
