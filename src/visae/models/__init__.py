"""Vision models behind one protocol: tokens at a site, and the network resumed from there."""
