"""Every block of code in the documents, run as it is written."""
