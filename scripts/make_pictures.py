"""Make the README's picture from a workspace that ``make demo`` wrote.

    .venv/bin/python scripts/make_pictures.py visae-demo

The features are the best one of each of the six classes that are marked best, as the report shows
them.
"""

import sys
from pathlib import Path

from visae.evaluation.card import read_card
from visae.features.index import FeatureIndex
from visae.reports.figures import overview_sheet

workspace = Path(sys.argv[1])
classes = read_card(workspace / "saes" / "seed0").classes
ranked = sorted(classes, key=lambda one: -one.average_precision)
features = list(dict.fromkeys(one.feature for one in ranked))[:6]
index = FeatureIndex(workspace / "features" / "seed0@cifar10")
out = Path(__file__).parents[1] / "docs" / "images" / "features.png"
out.parent.mkdir(parents=True, exist_ok=True)
overview_sheet(index, features).save(out, optimize=True)
print(f"{out}: features {features}")
