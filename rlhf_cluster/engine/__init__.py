"""DeepSpeed: the one door to it. SFT, the reward model and the learner train through `TrainEngine`; nothing here knows
what is being learnt. Takes a torch module and our typed config; gives losses' gradients, steps, full weights and
state."""
