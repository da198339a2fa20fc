"""Groups from one or several columns: images that share a value in any of them stay together.

A patient with images from two sites, and a site with images of two patients, make one group: the
connected components of the graph in which each image is joined to its value in each column.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["column_names", "join_groups"]


def column_names(text: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """The columns that an option names, joined by commas, or the one column of that whole name."""
    if text is None:
        return ()
    return (text,) if text in known else tuple(text.split(","))


def join_groups(columns: Mapping[str, Sequence[str | None]]) -> list[str | None]:
    """The group of each image, None where it has no value in any column.

    One column gives its values. Several give the connected components, each named by the first
    ``column=value`` in it by code point, so that the name does not depend on the order of images.

    Args:
        columns: The values of the images in each column, all of one length.
    """
    if len(columns) == 1:
        return list(*columns.values())
    edges = [
        (row, f"{name}={value}")
        for name, values in columns.items()
        for row, value in enumerate(values)
        if value is not None
    ]
    if not edges:
        return [None] * len(next(iter(columns.values()), ()))
    return _components(edges, n_images=len(next(iter(columns.values()))))


def _components(edges: Sequence[tuple[int, str]], *, n_images: int) -> list[str | None]:
    """The smallest name in the component of each image; the graph is images, then names."""
    names = sorted({name for _, name in edges})
    node = {name: n_images + i for i, name in enumerate(names)}
    rows = np.array([row for row, _ in edges])
    columns = np.array([node[name] for _, name in edges])
    n_nodes = n_images + len(names)
    graph = coo_array((np.ones(len(edges), np.int8), (rows, columns)), shape=(n_nodes, n_nodes))
    component = connected_components(graph, directed=False)[1].tolist()
    name_of: dict[int, str] = {}
    for name in names:
        name_of.setdefault(component[node[name]], name)
    return [name_of.get(component[row]) for row in range(n_images)]
