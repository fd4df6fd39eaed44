"""The field's benchmarks: how their files are read, their questions put and their answers scored."""
