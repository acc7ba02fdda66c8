"""A small trained checkpoint that ships with the package, the stories it learned from, and the script that made it."""
