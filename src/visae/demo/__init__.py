"""All eight verbs on a real pretrained model and real images, with PyPI alone."""
