"""Models on disk: loading, saving, layouts, checkpoint records."""
