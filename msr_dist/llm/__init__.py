"""What a frozen language model knows of users and scenarios: histories, prompts, vectors."""
