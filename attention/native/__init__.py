"""This package has the native kernel of a CPU memory node: its C++ sources, their build, and the built library."""
