"""The frozen policy that the KL penalty is measured from. Takes rollouts, gives their logprobs under it; never
learns."""
