"""Static HTML pages that open from disk: no network, no fonts or scripts from elsewhere.

A page is a Jinja template in ``templates/`` that extends ``base.html``::

    {% extends "base.html" %}
    {% import "macros.html" as show %}
    {% block title %}…{% endblock %}        name of the page, in the browser's tab
    {% block path %}…{% endblock %}         links up to where one came from
    {% block main %}…{% endblock %}         the content, starting with one <h1>
    {% block script %}…{% endblock %}       a script of the page, where it needs one

``base.html`` brings the styles of ``style.css`` inside the page, for light and dark.
``macros.html`` has the building blocks: ``chart`` (an SVG with caption and description),
``picture``, ``facts`` (pairs of a name and a measured value), ``verdict``, ``note``, ``pair`` (an
image and its heat map) and ``histogram``. The filters ``number``, ``fixed``, ``count``,
``percent`` and ``plural`` write values as everywhere in visae. Everything is escaped unless it is
``Markup``.
"""

import base64
import functools
import io
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

import visae
from visae.reports.wording import count, fixed, number, percent, plural
from visae.storage.atomic import write_text

__all__ = ["picture_uri", "render", "svg_markup", "write_page"]


def render(template: str, **context: Any) -> str:
    """A page, or a part of one, from a template of this package.

    A name that the template uses and the context lacks is an error of the program.
    """
    return _environment().get_template(template).render(**context)


def write_page(path: Path, template: str, **context: Any) -> Path:
    """Render a template into a file, atomically, and give its path.

    Raises:
        StoreError: when the disk is full, read-only or not permitted.
    """
    write_text(path, render(template, **context))
    return path


def svg_markup(svg: str) -> Markup:
    """An SVG of ``visae.reports.charts``, marked as HTML that needs no escaping."""
    return Markup(svg)  # noqa: S704 - our own charts, whose texts matplotlib has escaped


def picture_uri(image: Image.Image) -> str:
    """A picture as a PNG inside a data URI, for the ``src`` of an image in a page of one file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("visae.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {f.__name__: f for f in (count, fixed, number, percent, plural)}
    environment.filters |= filters
    environment.globals |= {"visae_version": visae.__version__}
    return environment
