"""The spine as geometry: axes and canal of a chain of vertebrae, heights of their bodies, grade and gate, names."""
