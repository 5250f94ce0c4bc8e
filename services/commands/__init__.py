"""The commands of `fracture-sweep`, a module a group; `services/__main__.py` gives them their names."""
