"""What a trained model is asked: scores and texts."""
