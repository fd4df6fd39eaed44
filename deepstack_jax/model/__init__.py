"""The model as single-device code with logical axis names. Knows no grid and no mesh."""
