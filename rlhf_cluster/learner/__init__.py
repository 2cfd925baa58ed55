"""Policy and critic on each rank: evaluates rows as they arrive, makes advantages of them, updates in minibatches.

Takes `ScoredRollouts`, gives `UpdateStats`, published weights and checkpoints. It knows nothing of who sampled, of who
scored, or of Ray; all ranks run this same code."""
