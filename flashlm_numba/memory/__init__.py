"""A memory of the training text beside the model: what has occurred, where the model knows what is alike.

gate.py mixes both. config.py has the settings.
"""
