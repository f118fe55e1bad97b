"""The model: settings, parameters, both passes, and its files."""
