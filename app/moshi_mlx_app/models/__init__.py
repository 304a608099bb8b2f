"""Published models, the choice of a default, downloads, and the speed of this machine."""
