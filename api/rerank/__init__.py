"""Ranks documents, in the forms of Jina and Cohere and of Text Embeddings Inference."""
