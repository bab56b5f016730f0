"""Errors, registry, files, exact sums and small linear algebra."""
