"""Plugin discovery, safe calls of plugin code, and lookup of offers by name. Imports no torch."""
