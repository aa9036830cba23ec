"""Ways to fine-tune: the starter has the assignment's own recipe only."""
