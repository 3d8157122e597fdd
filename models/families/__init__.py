"""One short file for each family of models: from its config.json to the parts that it is made of. Never torch."""
