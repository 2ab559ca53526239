"""Plugin discovery, safe calls of plugin code, and lookup by name of what plugins provide. Imports no torch."""
