"""The routes about tokens and prompts: those of llama.cpp's server and of vLLM, and OpenAI's count."""
