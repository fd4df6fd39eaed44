"""What the model sees of a data set, as a page to look at before a run. Everything shown is read off the arrays of a batch."""
