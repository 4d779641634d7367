"""What the tests of samples and of tokens share."""


def scored_text(row, tokenizer):
    return tokenizer.decode([token for token, counts in zip(row["token_ids"], row["scored"], strict=True) if counts])
