"""The run config: its sections, reading it from YAML or Python, and checking it. Imports no torch."""
