"""Make the conversations, train, evaluate and export the language model."""
