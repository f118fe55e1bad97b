"""Inference with a trained model: scoring text and generating text."""
