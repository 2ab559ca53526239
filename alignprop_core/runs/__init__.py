"""The run folder: file names, atomic writes, lock, metrics, environment. Imports no torch."""
