"""How well a model does: tasks over it, and what `infer eval` makes of their answers."""
