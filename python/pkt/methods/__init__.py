"""The methods: each wires stages, and its ``run`` reads as the paper's numbered steps."""
