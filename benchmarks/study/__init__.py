"""The injection laboratory: what holds of the paper's claims, and of its descendants', on tasks that anyone can afford."""
