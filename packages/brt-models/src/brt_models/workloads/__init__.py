"""What `brt bench` runs, one file a model."""
