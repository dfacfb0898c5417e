"""Instructions and answers that a model makes up, for other models to be trained on."""
