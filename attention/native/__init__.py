"""The native kernel of a CPU memory node: its C++ sources, how they are built, and the library that comes of it."""
