"""The scoring pool's workers: one scalar per response. Takes rollouts, gives `Scores`; knows nothing of policy or
learner."""
