"""Several machines as one: the network between them, what each needs, and what of it comes back."""
