"""vLLM's side: a weight-transfer backend named ``asystem``, and the engine that rolls out."""
