"""A small trained checkpoint that ships with the package, the stories it is trained on, and its training script."""
