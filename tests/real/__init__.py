"""A real language model, from a package of the package index: `make test-real`."""
