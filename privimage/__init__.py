"""PrivImage: differentially private image synthesis, from a laptop to a cluster."""

__version__ = "0.1.0"
