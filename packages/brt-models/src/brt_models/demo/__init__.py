"""What `brt demo` runs, one a model."""
