"""The commands of `infer`, a file each."""
