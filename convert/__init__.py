"""Every foreign format of weights, in and out."""
