"""`backend` is every backend here, plain transformers among them."""

from every_backend import backend

__all__ = ["backend"]
