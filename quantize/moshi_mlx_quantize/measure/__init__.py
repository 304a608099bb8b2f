"""What a recipe costs, and the report about it."""
