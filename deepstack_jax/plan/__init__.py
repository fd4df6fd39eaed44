"""What a run costs on machines that are not here: the very step compiled ahead of time, its memory, traffic and time."""
