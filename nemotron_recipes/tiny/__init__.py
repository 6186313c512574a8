"""What the project makes itself, so that every stage runs without a hub: a tokenizer, a model, tasks with sample rows."""
