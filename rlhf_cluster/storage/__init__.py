"""What a run leaves on disk: its directory, atomic checkpoints, the rollout log; all of it whole or not there."""
