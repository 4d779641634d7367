"""What scoring would cost, before it is done."""
