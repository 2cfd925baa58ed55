"""How a published policy reaches the generation workers: a versioned store of full snapshots in shared memory, and the
engine that vLLM loads them with. Nothing here knows how the weights were learnt or what is sampled with them."""
