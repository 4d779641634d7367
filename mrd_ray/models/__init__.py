"""Models and tokenizers: their files, and how they are loaded, trained and saved."""
