"""Every way a model comes in or goes out: loading, saving, layouts, checkpoint records."""
