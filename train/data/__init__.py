"""From records of text to batches of tokens and labels."""
