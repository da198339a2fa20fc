"""Which tar files a pattern names: ``train-{000..009}.tar``, ``{train,val}/*.tar`` or one path."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from visae.errors import ImageError
from visae.images.location import is_there, nearest_siblings

__all__ = ["find_shards", "fixed_folder"]

_MAX_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_WILDCARD = re.compile(r"[*?\[]")
_BRACES_OR_WILDCARD = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_shards(pattern: str) -> list[Path]:
    """Every file that a pattern names, absolute, those of a wildcard in code-point order.

    Braces hold a range of numbers (zero-padded as its first) or texts joined by commas; the files
    they name must all be there. A file whose own name is the pattern is taken as it stands.

    Raises:
        ImageError: when one is missing or nothing fits.
    """
    if is_there(Path(pattern)):
        return [Path(pattern).absolute()]
    found = [path for one in _expand(pattern) for path in _matches(one)]
    return list(dict.fromkeys(found))


def fixed_folder(pattern: str) -> Path:
    """The folder that all files of a pattern lie below, whatever is in it now."""
    path = Path(pattern).absolute()
    if is_there(path):
        return path.parent
    parts = itertools.takewhile(lambda part: not _BRACES_OR_WILDCARD.search(part), path.parts)
    folder = Path(*parts)
    return folder.parent if folder == path else folder


def _expand(pattern: str) -> Iterator[str]:
    """The pattern with each choice of its braces."""
    parts = _BRACES.split(pattern)
    choices = [[part] if i % 2 == 0 else _choices(part, pattern) for i, part in enumerate(parts)]
    for n_files, chosen in enumerate(itertools.product(*choices), start=1):
        if n_files > _MAX_SHARDS:
            what = f"This pattern names more than {_MAX_SHARDS} files"
            raise ImageError(what, where=pattern, fix="Correct the numbers in braces")
        yield "".join(chosen)


def _choices(text: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        return text.split(",")
    first, last = numbers.groups()
    if int(last) < int(first) or int(last) - int(first) >= _MAX_SHARDS:
        what = f"The range {{{text}}} is no range of shards"
        raise ImageError(what, where=pattern, fix="Write {first..last} with the smaller first")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _matches(name: str) -> list[Path]:
    path = Path(name).absolute()
    if is_there(path):
        return [path]
    if not _WILDCARD.search(name):
        fix = f"Restore it or correct the pattern; {nearest_siblings(path)}"
        raise ImageError("There is no such tar file", where=name, fix=fix)
    fixed = fixed_folder(name)
    found = sorted(fixed.glob(path.relative_to(fixed).as_posix()))
    if not found:
        fix = f"Correct the pattern; {nearest_siblings(fixed / path.name)}"
        raise ImageError("No tar file fits this pattern", where=name, fix=fix)
    return found
