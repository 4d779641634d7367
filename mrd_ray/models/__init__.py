"""Models and tokenizers: which files they are, how they are loaded, trained and saved."""
