"""ASystem: Megatron trains, vLLM rolls out, weights and versions stay in step."""
