"""Every foreign format of weights, in and out."""

from convert.load import load_model
from convert.save import save_model

__all__ = ["load_model", "save_model"]
