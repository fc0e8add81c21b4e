"""What optimizers around another optimizer share. Private."""
