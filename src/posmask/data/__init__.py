"""Data: texts, tokens, language models and the vectors harvested from them."""
