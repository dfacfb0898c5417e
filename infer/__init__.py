"""Text out of a model: sampling and generation over `model`'s one forward."""
