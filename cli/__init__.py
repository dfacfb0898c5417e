"""What the commands of every room share."""
