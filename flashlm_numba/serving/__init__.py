"""A server with OpenAI's completions interface."""
