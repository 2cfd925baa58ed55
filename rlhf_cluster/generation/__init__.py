"""The vLLM worker: samples responses from the policy with continuous batching. It takes `Members`, gives `Rollouts`,
and knows nothing of rewards, of the learner or of Ray."""
