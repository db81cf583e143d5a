"""What other tools read and write: their words and formats end here."""
