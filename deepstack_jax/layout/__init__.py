"""Where every visual token goes, as index arrays built on the host. Imports numpy only."""
