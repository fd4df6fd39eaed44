"""What a run leaves on disk to continue from: saved, verified, restored, whole or the parameters alone."""
