"""Know before: what a model costs on a machine, and which formats to choose."""
