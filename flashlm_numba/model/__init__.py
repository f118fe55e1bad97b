"""The model: settings, parameters, forward and backward pass, and files."""
