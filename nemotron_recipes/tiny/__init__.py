"""What the project makes itself, so that every stage runs without a hub: tokenizer, model, sample rows."""
