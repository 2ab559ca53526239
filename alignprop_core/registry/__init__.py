"""Plugins: discovery, calling their code safely, and looking up by name what they offer. Imports no torch."""
